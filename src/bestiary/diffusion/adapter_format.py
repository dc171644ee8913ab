"""The content of an adapter's file: LoRA weights, their config and what they were trained from.

The format is diffusers' for pipelines: a safetensors file with the config in its header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

FILE_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "unet."  # of the weights and of the config's fields
CONFIG_KEY = "lora_adapter_metadata"  # where diffusers looks for the config; without one, it takes the rank for alpha
PROVENANCE_KEY = "bestiary"
# Kohya files keep the config under this key: with diffusers' own key, diffusers would take them for its own format.
KOHYA_CONFIG_KEY = "bestiary_config"
MAX_RANK_OR_ALPHA = 1e6  # no adapter needs more, and float16 overflows far below
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which cannot be written to a file
MAX_TEXT = 1000  # characters: a path on any system, and more than a base's name on the hub


def _writable(text: str) -> str:
    if SURROGATE.search(text):
        raise ValueError("holds half a character")
    return text


Text = Annotated[str, AfterValidator(_writable), Field(max_length=MAX_TEXT)]


class AdapterConfig(BaseModel):
    """The LoRA config, under PEFT's names: every field that decides what the adapter draws.

    >>> AdapterConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]).use_dora
    False
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    r: int = Field(ge=1, le=MAX_RANK_OR_ALPHA)
    lora_alpha: int | float = Field(ge=-MAX_RANK_OR_ALPHA, le=MAX_RANK_OR_ALPHA)  # both, to write what was read
    target_modules: list[str]
    # 0 whatever it was trained with: diffusers loads dropout in training mode, and its pictures would be random.
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False


class Provenance(BaseModel):
    """What an adapter was trained from; None for whatever its file does not say. Keys of later versions are kept."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    base: Text | None = None  # a folder, or an id on the Hugging Face hub
    base_revision: Text | None = None  # the commit on the hub
    base_sha256: Text | None = None
    data_sha256: Text | None = None  # of the images, their captions and how they were encoded
    resolution: int | None = None  # pixels a side
    params: dict[str, Any] | None = None  # the training settings as they were then, for people to read

    def to_json(self) -> str:
        """The provenance as its file holds it.

        >>> Provenance(base="models/base", resolution=64).to_json()
        '{"base": "models/base", "resolution": 64}'
        """
        return json.dumps({key: value for key, value in self if value is not None}, sort_keys=True)


@dataclass(frozen=True)
class AdapterContent:
    """An adapter as read from a file."""

    weights: Mapping[str, torch.Tensor]  # by the UNet's own names: `down_blocks.0....to_q.lora_A.weight`
    config: AdapterConfig
    provenance: Provenance
    alpha_rule: str | None = None  # where the alpha is from, when the file does not store it
    few_step: bool = False  # distilled to draw in 1 to 8 steps without guidance, as far as its name says

    def to_bytes(self) -> bytes:
        """The file in diffusers' format. The same adapter gives the same bytes."""
        from safetensors.torch import save

        weights = {f"{PREFIX}{key}": value.contiguous() for key, value in self.weights.items()}
        config = {f"{PREFIX}{field}": value for field, value in self.config}
        metadata = {
            "format": "pt",
            CONFIG_KEY: json.dumps(config, sort_keys=True),
            PROVENANCE_KEY: self.provenance.to_json(),
        }
        return with_sorted_header(save(weights, metadata))


def with_sorted_header(data: bytes) -> bytes:
    """The same safetensors file with sorted metadata: the library writes it in a random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
