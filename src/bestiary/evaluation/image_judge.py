"""An image-only judge, such as DINOv2 (arXiv:2304.07193): it tells individuals apart, and knows no words."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError
from bestiary.evaluation.judge import BATCH_SIZE

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedModel


class ImageJudge:
    """A vision model with its preprocessing. It turns pictures into unit vectors (B, D)."""

    def __init__(self, model: PreTrainedModel, image_processor: BaseImageProcessor, device: str = "cpu") -> None:
        self.model = model.to(device).eval()
        self.image_processor = image_processor
        self.device = device

    @classmethod
    def load(cls, model: str, revision: str | None = None, device: str = "cpu") -> ImageJudge:
        """Load the model from a folder, or by its id from the Hugging Face hub, in float32.

        Raises BestiaryError when it does not exist, cannot be read, or has no class token.
        """
        import torch
        from transformers import AutoModel
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        from bestiary.diffusion.base import quiet_loading

        is_folder = Path(model).is_dir()
        where = {"revision": revision, "local_files_only": is_folder}
        try:
            with quiet_loading() if is_folder else nullcontext():
                loaded = AutoModel.from_pretrained(model, dtype=torch.float32, **where)
                # The Pillow backend: torchvision is not installed.
                processor = AutoImageProcessor.from_pretrained(model, backend="pil", **where)
        except Exception as error:  # transformers, the hub and safetensors raise different types
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise BestiaryError(f"The image judge {model!r} cannot be loaded: {reason}. Check its name.") from error
        return cls(loaded, processor, device)

    def class_tokens(self, images: Sequence[Image]) -> Tensor:
        """Unit vectors (B, D) of RGB pictures of any size: the class token after the last layer norm."""
        import torch

        batches = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = [image.convert("RGB") for image in images[start : start + BATCH_SIZE]]
            pixel_values = self.image_processor(batch, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                tokens = self.model(pixel_values=pixel_values.to(self.device)).last_hidden_state[:, 0].float().cpu()
            batches.append(tokens / tokens.norm(dim=-1, keepdim=True))
        return torch.cat(batches)
