"""The content of an adapter's file: LoRA weights, their config and what they were trained from.

The format is diffusers' for pipelines: a safetensors file with the config in its header. Anyone can write such a file,
so everything in the header is checked before it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bestiary.errors import BestiaryError

FILE_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "unet."  # of the weights and of the config's fields
CONFIG_KEY = "lora_adapter_metadata"  # where diffusers looks for the config; without one, it takes the rank for alpha
PROVENANCE_KEY = "bestiary"
WEIGHT_TYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
MAX_RANK_OR_ALPHA = 1e6  # no adapter needs more, and float16 overflows far below
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which cannot be written to a file


def _writable(text: str) -> str:
    if SURROGATE.search(text):
        raise ValueError("holds half a character")
    return text


Text = Annotated[str, AfterValidator(_writable)]


class AdapterConfig(BaseModel):
    """The LoRA config, under PEFT's names: every field that decides what the adapter draws.

    >>> AdapterConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]).use_dora
    False
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    r: int = Field(ge=1, le=MAX_RANK_OR_ALPHA)
    lora_alpha: int | float = Field(ge=-MAX_RANK_OR_ALPHA, le=MAX_RANK_OR_ALPHA)  # both, to write what was read
    target_modules: list[str]
    lora_dropout: int | float = Field(default=0.0, ge=0, le=1)
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

    def to_bytes(self) -> bytes:
        """The file in diffusers' format. The same adapter gives the same bytes."""
        weights = {f"{PREFIX}{key}": value.contiguous() for key, value in self.weights.items()}
        config = {f"{PREFIX}{field}": value for field, value in self.config}
        metadata = {
            "format": "pt",
            CONFIG_KEY: json.dumps(config, sort_keys=True),
            PROVENANCE_KEY: self.provenance.to_json(),
        }
        return with_sorted_header(save(weights, metadata))


def read_adapter(file: Path) -> AdapterContent:
    """Read an adapter in diffusers' format.

    Raises BestiaryError when the file is not a complete and usable adapter in this format.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BestiaryError(f"{file} is not a readable safetensors file ({error}).") from None
    header = read_object(metadata.get(CONFIG_KEY), file)
    content = {key.removeprefix(PREFIX): value for key, value in header.items() if key.startswith(PREFIX)}
    provenance = parse_provenance(metadata.get(PROVENANCE_KEY), file)
    if not {"r", "lora_alpha", "target_modules"} <= content.keys():
        raise BestiaryError(
            f"The adapter {file} does not store its rank, alpha and targets, so its effect is unknown. "
            "`bestiary adapter convert` reads other formats."
        )
    config = parse_config(content, file)
    if not weights:
        raise BestiaryError(f"{file} holds no LoRA weights.")
    foreign = next((key for key in weights if not key.startswith(PREFIX)), None)
    if foreign:
        raise BestiaryError(
            f"The adapter {file} is not in diffusers' pipeline format: it holds {foreign}. "
            "`bestiary adapter convert` reads other formats."
        )
    check_weights(weights, file)
    return AdapterContent({key.removeprefix(PREFIX): value for key, value in weights.items()}, config, provenance)


def read_object(text: str | bytes | None, file: Path) -> dict[str, Any]:  # untrusted JSON
    """The JSON object in a file's header; empty when there is none. Raises BestiaryError when it is something else."""
    try:
        content = json.loads("{}" if text is None else text)
    except (ValueError, RecursionError):  # not JSON, nested too deeply, or with a number too long for Python
        content = None
    if not isinstance(content, dict):
        raise broken_config(file)
    return content


def parse_config(content: Mapping[str, Any], file: Path) -> AdapterConfig:
    """Check an untrusted LoRA config. Raises BestiaryError when it is broken, or differs from module to module."""
    if content.get("rank_pattern") or content.get("alpha_pattern"):
        raise BestiaryError(f"{file} gives its modules different ranks or alphas, which is not supported.")
    try:
        return AdapterConfig.model_validate(dict(content))
    except ValidationError:
        raise broken_config(file) from None


def parse_provenance(text: str | None, file: Path) -> Provenance:
    """Check the provenance in a file's header. Raises BestiaryError when it is broken."""
    try:
        return Provenance.model_validate(read_object(text, file))
    except ValidationError:
        raise broken_config(file) from None


def broken_config(file: Path) -> BestiaryError:
    """The error for a header that does not hold what it should."""
    return BestiaryError(f"The adapter {file} has a broken config. Get another copy of the file.")


def check_weights(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Raise BestiaryError when a weight is not finite, or of a type that a UNet cannot take without loss."""
    for key, weight in weights.items():
        if weight.dtype not in WEIGHT_TYPES:
            raise BestiaryError(f"{file} holds {key} as {str(weight.dtype).removeprefix('torch.')}: not supported.")
        if not torch.isfinite(weight).all():
            raise BestiaryError(f"{file} holds values that are not finite numbers: {key}.")


def with_sorted_header(data: bytes) -> bytes:
    """The same safetensors file with sorted metadata: the library writes it in a random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
