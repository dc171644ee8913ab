"""The LoRA config in an adapter's file: whatever PEFT, diffusers or this project wrote, checked field by field.

A field that could change the effect and is not understood is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bestiary.diffusion.adapter_format import (
    CONFIG_KEY,
    KOHYA_CONFIG_KEY,
    MAX_RANK_OR_ALPHA,
    PREFIX,
    TEXT_PREFIX,
    Part,
)
from bestiary.diffusion.stored_adapter import StoredAdapter, broken_config, read_object, too_large
from bestiary.errors import BestiaryError, shown

MAX_TARGETS = 2000  # a UNet of SDXL's size has 1,500 modules that can be adapted
# Fields of PEFT's LoraConfig (0.21) that do not change the effect of trained weights: they are for training, describe
# the file, or choose the modules, which the weights themselves name.
HARMLESS_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
READ_FIELDS = {"r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
# Values that leave a field without effect. Other initialisations, such as PiSSA, also change the base's own weights.
HARMLESS_VALUES: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
}
Alpha = Annotated[int | float, Field(ge=-MAX_RANK_OR_ALPHA, le=MAX_RANK_OR_ALPHA)]
ConfigFields = Mapping[str, Any]  # untrusted JSON
Number = TypeVar("Number", int, float)


class StoredConfig(BaseModel):
    """The fields of a LoRA config that are read, each where it is given."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    r: int | None = Field(default=None, ge=1, le=MAX_RANK_OR_ALPHA)
    lora_alpha: Alpha | None = None
    target_modules: list[str] | str | None = None
    lora_dropout: int | float = Field(default=0.0, ge=0, le=1)
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, Alpha] | None = None

    def rank_of(self, module: str, file: Path) -> int | None:
        """The rank that the config gives a module. Raises BestiaryError for a regular expression."""
        return _matching(self.rank_pattern or {}, module, "rank_pattern", file) or self.r

    def alpha_of(self, module: str, file: Path) -> float | int | None:
        """The alpha that the config gives a module. Raises BestiaryError for a regular expression."""
        alpha = _matching(self.alpha_pattern or {}, module, "alpha_pattern", file)
        return self.lora_alpha if alpha is None else alpha


def config_fields(stored: StoredAdapter, parts: Iterable[Part]) -> dict[Part, ConfigFields]:
    """The LoRA config of each part, from wherever the file keeps it. `parts` are those that have weights."""
    header = read_object(stored.metadata.get(CONFIG_KEY), stored.path, CONFIG_KEY)
    beside = read_object(stored.metadata.get(KOHYA_CONFIG_KEY), stored.path, KOHYA_CONFIG_KEY)
    of_text = beside.pop("text_encoder", {})
    fields: dict[Part, ConfigFields] = {
        "unet": beside | {
            key.removeprefix(PREFIX): value for key, value in header.items() if key.startswith(PREFIX) or "." not in key
        },
        "text_encoder": (of_text if isinstance(of_text, dict) else {}) | {
            key.removeprefix(TEXT_PREFIX): value for key, value in header.items() if key.startswith(TEXT_PREFIX)
        },
    }  # fmt: skip
    # PEFT saves each network in a folder of its own.
    only_text = list(parts) == ["text_encoder"]
    part: Part = "text_encoder" if only_text else "unet"
    fields[part] = {**stored.peft_config, **fields[part]}
    return fields


def check_config(fields: ConfigFields, file: Path) -> StoredConfig:
    """The fields that are read. Raises BestiaryError for one that could change the effect and is not understood."""
    for key in ("target_modules", "rank_pattern", "alpha_pattern"):
        listed = fields.get(key)
        if isinstance(listed, list | dict) and len(listed) > MAX_TARGETS:
            raise too_large(file, f"its number of {key}, {len(listed):,},", f"{MAX_TARGETS:,}")
    try:
        config = StoredConfig.model_validate(dict(fields))
    except ValidationError as error:
        field = shown(str(error.errors(include_url=False)[0]["loc"][0]))
        raise broken_config(file, f"{field} has no usable value") from None
    for field, value in fields.items():
        if field in HARMLESS_FIELDS | READ_FIELDS or value is None or value is False or value in ("", [], {}):
            continue
        if value not in HARMLESS_VALUES.get(field, ()):
            raise BestiaryError(
                f"{file} sets {shown(field)} to {shown(repr(value), 40)}, which may change its effect and is not "
                "supported. Merge the adapter with the program that made it, or train it without this setting."
            )
    return config


def targets(fields: ConfigFields, config: StoredConfig, modules: Iterable[str]) -> list[str]:
    """The stored targets if they can be what the weights are for, otherwise the modules that have weights.

    A regular expression, an exclusion or a choice of layers is not evaluated: the weights are their result.
    """
    listed = config.target_modules
    if isinstance(listed, list) and not any(
        fields.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern")
    ):
        names = set(listed)
        if listed and all(is_target(module, names) for module in modules):
            return listed
    return sorted(modules)


def is_target(module: str, targets: set[str] | frozenset[str]) -> bool:
    """Whether PEFT adapts this module for these targets: its name equals one or ends in `.target`."""
    return any(ending in targets for ending in _endings(module))


def _endings(module: str) -> list[str]:
    """The whole name of a module, and what remains of it after each dot."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _matching(patterns: Mapping[str, Number], module: str, field: str, file: Path) -> Number | None:
    """The value of the first pattern that is this module's name or its ending, as PEFT matches them.

    A pattern from a file may be any regular expression, which could take for ever, so only names are understood.
    """
    values: dict[str, tuple[int, Number]] = {}
    for place, (pattern, value) in enumerate(patterns.items()):
        name = pattern.removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"\^?[\w.-]+", name):
            raise BestiaryError(
                f"{file} chooses modules in {field} by the regular expression {shown(pattern)}, which is not "
                "supported. Save the adapter with the modules' names."
            )
        values.setdefault(name, (place, value))
    found = [values[ending] for ending in (*_endings(module), f"^{module}") if ending in values]
    return min(found)[1] if found else None
