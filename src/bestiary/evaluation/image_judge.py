"""An image-only judge, such as DINOv2 (arXiv:2304.07193): it tells individuals apart, and knows no words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError
from bestiary.evaluation.judge import BATCH_SIZE
from bestiary.hub import HubModel, download, is_hub_id

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedModel

CLASS_TOKENS = ("cls_token", "class_embedding")  # what the parameter is called in vision transformers


def on_hub(model: str, revision: str | None) -> HubModel:
    """The files of an image judge on the hub."""
    return HubModel("image judge", model, revision, key="evaluate.proof.image_judge")


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

        if not Path(model).is_dir() and not is_hub_id(model):
            raise BestiaryError(
                f"The image judge {model!r} cannot be loaded: the folder does not exist. Check its name."
            )
        folder = model if Path(model).is_dir() else download(on_hub(model, revision))
        try:
            with quiet_loading():
                loaded = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
                # The Pillow backend: torchvision is not installed.
                processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        except Exception as error:  # transformers and safetensors raise different types
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise BestiaryError(f"The image judge {model!r} cannot be loaded: {reason}. Check its name.") from error
        judge = cls(loaded, processor, device)
        judge._check(model)
        return judge

    def _check(self, model: str) -> None:
        """Raise BestiaryError when the model has no class token, or does not turn a picture into tokens."""
        from PIL import Image

        has_one = any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in self.model.named_parameters())
        try:
            tokens = self.class_tokens([Image.new("RGB", (64, 64))]) if has_one else None
        except Exception:  # a model for other inputs than pictures raises anything
            tokens = None
        if tokens is None or tokens.ndim != 2 or not tokens.isfinite().all():
            raise BestiaryError(
                f"The image judge {model!r} has no class token, which pictures are compared by. Choose a vision "
                "transformer that has one, such as facebook/dinov2-base."
            )

    def class_tokens(self, images: Sequence[Image]) -> Tensor:
        """Unit vectors (B, D) of RGB pictures of any size: the class token after the last layer norm."""
        import torch

        batches = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = [image.convert("RGB") for image in images[start : start + BATCH_SIZE]]
            pixel_values = self.image_processor(batch, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                seen = self.model(pixel_values=pixel_values.to(self.device))
            # CLIP's vision model normalises only what it calls the pooled output; others normalise all tokens.
            is_clip = self.model.config.model_type == "clip_vision_model"
            tokens = (seen.pooler_output if is_clip else seen.last_hidden_state[:, 0]).float().cpu()
            batches.append(tokens / tokens.norm(dim=-1, keepdim=True))
        return torch.cat(batches)
