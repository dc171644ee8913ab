"""The judge: a CLIP model that scores pictures against texts. It is never the base's own text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError
from bestiary.hub import HubModel, download, is_hub_id

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

BATCH_SIZE = 64


def on_hub(model: str, revision: str | None) -> HubModel:
    """The files of a judge on the hub."""
    return HubModel("judge", model, revision, key="judge")


class Judge:
    """A CLIP model (arXiv:2103.00020) with its preprocessing. It turns pictures and texts into unit vectors (B, D)."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        image_processor: CLIPImageProcessorPil,
        device: str = "cpu",
    ) -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.device = device

    @classmethod
    def load(cls, model: str, revision: str | None = None, device: str = "cpu") -> Judge:
        """Load the judge from the folder `model`, or by that id from the Hugging Face hub.

        Raises BestiaryError when it does not exist, cannot be read, or lacks weights.
        """
        import torch
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # needs no torchvision

        from bestiary.diffusion.base import quiet_loading

        if not Path(model).is_dir() and not is_hub_id(model):
            raise BestiaryError(f"The judge {model!r} cannot be loaded: the folder does not exist. Check its name.")
        folder = model if Path(model).is_dir() else download(on_hub(model, revision))
        try:
            with quiet_loading():
                # Always in float32: half precision changes a cosine by more than adapters differ.
                clip, loading = CLIPModel.from_pretrained(
                    folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
                )
                tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
                image_processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers and safetensors raise different types
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise BestiaryError(f"The judge {model!r} cannot be loaded: {reason}. Check its name.") from error
        if loading["missing_keys"]:  # transformers would fill them with random numbers
            missing = min(loading["missing_keys"])
            raise BestiaryError(f"The judge {model!r} is incomplete: it has no {missing}. Download it again.")
        return cls(clip, tokenizer, image_processor, device)

    def image_features(self, images: Sequence[Image]) -> Tensor:
        """Unit vectors (B, D) of RGB pictures of any size, float32 on the CPU."""
        import torch

        batches = [torch.empty(0, self.model.config.projection_dim)]
        for pooled in self._pooled(images):
            with torch.inference_mode():
                batches.append(_unit(self.model.visual_projection(pooled)))
        return torch.cat(batches)

    def class_tokens(self, images: Sequence[Image]) -> Tensor:
        """Unit vectors (B, vision width) of RGB pictures: the class token before it is projected to the texts' space.

        It tells individuals of one class apart better than `image_features`, and cannot be compared with texts.
        """
        import torch

        batches = [torch.empty(0, self.model.config.vision_config.hidden_size)]
        batches.extend(_unit(pooled) for pooled in self._pooled(images))
        return torch.cat(batches)

    def _pooled(self, images: Sequence[Image]) -> Iterator[Tensor]:
        """The class token of each picture after the last layer norm, in batches (B, vision width) on the device."""
        import torch

        for start in range(0, len(images), BATCH_SIZE):
            batch = [image.convert("RGB") for image in images[start : start + BATCH_SIZE]]
            pixel_values = self.image_processor(batch, return_tensors="pt")["pixel_values"]  # (B, C, H, W)
            with torch.inference_mode():
                pooled: Tensor = self.model.vision_model(pixel_values=pixel_values.to(self.device)).pooler_output
            yield pooled

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) of texts, float32 on the CPU. A text that is too long for the judge is truncated."""
        import torch

        batches = [torch.empty(0, self.model.config.projection_dim)]
        length = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), BATCH_SIZE):
            # Always padded to the full length, so that a text's features do not depend on the other texts.
            tokens = self.tokenizer(
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
        """The probability of each text for each picture (B, len(texts)). Rows sum to 1."""
        scale = self.model.logit_scale.detach().exp().cpu()
        logits: Tensor = self.image_features(images) @ self.text_features(texts).T * scale
        return logits.softmax(dim=-1)


def _unit(features: Tensor) -> Tensor:
    return features.div(features.norm(dim=-1, keepdim=True)).float().cpu()
