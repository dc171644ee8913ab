"""The content of an adapter's file: LoRA weights, their config and what they were trained from.

The format is diffusers' for pipelines: a safetensors file with the config in its header.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from bestiary.samplers import Sampling, sampling_to_json

if TYPE_CHECKING:
    import torch

    from bestiary.diffusion.weight_changes import WeightChange

Part = Literal["unet", "text_encoder"]  # the networks of a base that an adapter changes
PART_NAMES: dict[Part, str] = {"unet": "UNet", "text_encoder": "text encoder"}
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # the ends of a LoRA's names
FILE_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "unet."  # of the UNet's weights and of its config's fields
TEXT_PREFIX = "text_encoder."  # the same for the text encoder
CONFIG_KEY = "lora_adapter_metadata"  # where diffusers looks for the config; without one, it takes the rank for alpha
PROVENANCE_KEY = "bestiary"
CONTAINS = "contains"  # in the provenance of a merged adapter: what its parents contain; of a weighted copy: its source
FEW_STEP_KEY = "bestiary.few_step"  # how to draw with a few-step adapter
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
    # The ranks and alphas of the modules that have others than r and lora_alpha, by the modules' whole names.
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = Field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of a module's weights."""
        return self.rank_pattern.get(module, self.r)

    def alpha_of(self, module: str) -> int | float:
        """The alpha of a module."""
        return self.alpha_pattern.get(module, self.lora_alpha)

    def scale_of(self, module: str) -> float:
        """The factor of B A: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def weighted(self, weight: float) -> AdapterConfig:
        """The config of the same adapter with `weight` multiplied into its alphas."""
        alphas = {module: alpha * weight for module, alpha in self.alpha_pattern.items()}
        return self.model_copy(update={"lora_alpha": self.lora_alpha * weight, "alpha_pattern": alphas})

    def stored(self, prefix: str = "") -> dict[str, object]:
        """The fields as files hold them, without patterns that are empty."""
        return {f"{prefix}{name}": value for name, value in self if value or not name.endswith("_pattern")}


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
    """An adapter as read from a file: the LoRA of the UNet and of the text encoder, and changes of other kinds.

    `weights` go by the UNet's own names (`down_blocks.0....to_q.lora_A.weight`), `text_weights` by the text encoder's
    (`text_model.encoder.layers.0...`), `changes` by part and module.
    """

    weights: Mapping[str, torch.Tensor]
    config: AdapterConfig  # of `weights`; without effect when there are none
    provenance: Provenance
    alpha_rule: str | None = None  # where the alpha is from, when the file does not store it
    few_step: Sampling | None = None  # how to draw with an adapter that was distilled for a few steps
    text_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    text_config: AdapterConfig | None = None
    changes: Mapping[tuple[Part, str], WeightChange] = field(default_factory=dict)

    def lora(self, part: Part) -> tuple[Mapping[str, torch.Tensor], AdapterConfig | None]:
        """The LoRA weights of a part and their config."""
        return (self.weights, self.config) if part == "unet" else (self.text_weights, self.text_config)

    def modules(self, part: Part) -> list[str]:
        """The modules of a part that the adapter changes, in the order of their names."""
        weights, _ = self.lora(part)
        changed = {module for of, module in self.changes if of == part}
        return sorted(changed | {key.rsplit(".lora_", 1)[0] for key in weights})

    @property
    def parts(self) -> list[Part]:
        """The networks that the adapter changes."""
        return [part for part in PART_NAMES if self.modules(part)]

    @property
    def ranks(self) -> list[int]:
        """The rank of each module that has one."""
        of_loras = [config.rank_of(module) for module, config in self._lora_modules()]
        return of_loras + [change.rank for change in self.changes.values() if change.rank is not None]

    @property
    def alphas(self) -> list[float]:
        """The alpha of each module that has one."""
        of_loras = [float(config.alpha_of(module)) for module, config in self._lora_modules()]
        return of_loras + [change.alpha for change in self.changes.values() if change.alpha is not None]

    def _lora_modules(self) -> Iterator[tuple[str, AdapterConfig]]:
        for part in PART_NAMES:
            weights, config = self.lora(part)
            for key in weights:
                if config and key.endswith(DOWN):
                    yield key.removesuffix(DOWN), config

    @property
    def beyond_unet_lora(self) -> str | None:
        """What the adapter has besides LoRA weights of the UNet, in words; None for nothing."""
        kinds = sorted({change.kind for change in self.changes.values()})
        return ", ".join([*(["LoRA of the text encoder"] if self.text_weights else []), *kinds]) or None

    @property
    def own_metadata(self) -> dict[str, str]:
        """This project's metadata in every format's header: provenance, and how to draw with a few-step adapter."""
        few_step = {FEW_STEP_KEY: sampling_to_json(self.few_step)} if self.few_step else {}
        return {PROVENANCE_KEY: self.provenance.to_json(), **few_step}

    def to_bytes(self) -> bytes:
        """The file in diffusers' format, which holds LoRA only. The same adapter gives the same bytes."""
        from safetensors.torch import save

        weights = {f"{PREFIX}{key}": value.contiguous() for key, value in self.weights.items()}
        weights |= {f"{TEXT_PREFIX}{key}": value.contiguous() for key, value in self.text_weights.items()}
        config = self.config.stored(PREFIX) if self.weights or not self.text_weights else {}
        if self.text_config:
            config |= without_text_model(self.text_config).stored(TEXT_PREFIX)
        metadata = {
            "format": "pt",
            CONFIG_KEY: json.dumps(config, sort_keys=True),
            **self.own_metadata,
        }
        return with_sorted_header(save(weights, metadata))


def without_text_model(config: AdapterConfig) -> AdapterConfig:
    """The config with modules named so that PEFT finds them whether or not transformers puts them in a `text_model`."""

    def short(name: str) -> str:
        return name.removeprefix("text_model.")

    return config.model_copy(
        update={
            "target_modules": [short(name) for name in config.target_modules],
            "rank_pattern": {short(name): rank for name, rank in config.rank_pattern.items()},
            "alpha_pattern": {short(name): alpha for name, alpha in config.alpha_pattern.items()},
        }
    )


def spread(values: Iterable[float]) -> str:
    """The values in words: one number, or the lowest and the highest.

    >>> spread([4, 4]), spread([4, 8, 16])
    ('4', '4 to 16')
    """
    known = list(values)
    if not known:
        return "none"
    low, high = min(known), max(known)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def with_sorted_header(data: bytes) -> bytes:
    """The same safetensors file with sorted metadata: the library writes it in a random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
