"""The judge: a CLIP that scores pictures against words, and never the text encoder that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

BATCH_SIZE = 64


class Judge:
    """A CLIP (arXiv 2103.00020) with its preprocessing: pictures and texts in, unit vectors (B, D) out."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, device: str = "cpu") -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.device = device

    @classmethod
    def load(cls, model: str, revision: str | None = None, device: str = "cpu") -> Judge:
        """The judge in the folder `model`, or of that id on the Hugging Face hub.

        Raises BestiaryError when there is none, or not a whole one.
        """
        import torch
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # needs no torchvision

        is_folder = Path(model).is_dir()
        if not is_folder and Path(model).parent.is_dir():  # a path, so do not ask the hub for it
            raise BestiaryError(f"The judge {model!r} cannot be loaded: there is no such folder.")
        where: dict[str, Any] = {"revision": revision, "local_files_only": is_folder}
        try:
            # In float32 whatever the file holds: half precision moves a cosine by more than adapters differ in.
            clip, loading = CLIPModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True, **where)
            tokenizer = CLIPTokenizer.from_pretrained(model, **where)
            image_processor = CLIPImageProcessorPil.from_pretrained(model, **where)
        except Exception as error:  # transformers, hub and safetensors each raise their own kinds
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise BestiaryError(f"The judge {model!r} cannot be loaded: {reason}.") from error
        if loading["missing_keys"]:  # transformers fills them with random numbers and goes on
            raise BestiaryError(f"The judge {model!r} is no whole CLIP: it has no {min(loading['missing_keys'])}.")
        return cls(clip, tokenizer, image_processor, device)

    def image_features(self, images: Sequence[Image]) -> Tensor:
        """Unit vectors (B, D) of RGB pictures of any size, float32 on the CPU."""
        import torch

        batches = [torch.empty(0, self.model.config.projection_dim)]
        for start in range(0, len(images), BATCH_SIZE):
            batch = [image.convert("RGB") for image in images[start : start + BATCH_SIZE]]
            pixel_values = self.image_processor(batch, return_tensors="pt")["pixel_values"]  # (B, C, H, W)
            with torch.inference_mode():
                pooled = self.model.vision_model(pixel_values=pixel_values.to(self.device)).pooler_output
                batches.append(_unit(self.model.visual_projection(pooled)))
        return torch.cat(batches)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) of texts, float32 on the CPU; a text longer than the judge reads is cut."""
        import torch

        batches = [torch.empty(0, self.model.config.projection_dim)]
        length = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), BATCH_SIZE):
            tokens = self.tokenizer(  # always padded to the full length, so that a text scores the same in any company
                list(texts[start : start + BATCH_SIZE]),
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                pooled = self.model.text_model(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                ).pooler_output
                batches.append(_unit(self.model.text_projection(pooled)))
        return torch.cat(batches)

    def probabilities(self, images: Sequence[Image], texts: Sequence[str]) -> Tensor:
        """How likely each of `texts` is for each picture, (B, len(texts)): rows sum to 1."""
        scale = self.model.logit_scale.detach().exp().cpu()
        logits: Tensor = self.image_features(images) @ self.text_features(texts).T * scale
        return logits.softmax(dim=-1)


def _unit(features: Tensor) -> Tensor:
    return features.div(features.norm(dim=-1, keepdim=True)).float().cpu()
