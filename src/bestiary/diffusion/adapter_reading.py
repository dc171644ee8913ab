"""Read an adapter that any program wrote: diffusers, PEFT, kohya, the original system.

A file says little of who wrote it, so the producer is known by its keys, and decides what a missing alpha means. What
would change the effect and is not understood is refused by name: a wrong strength draws pictures that look plausible.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bestiary.diffusion.adapter_format import (
    CONFIG_KEY,
    FILE_NAME,
    KOHYA_CONFIG_KEY,
    MAX_RANK_OR_ALPHA,
    PREFIX,
    PROVENANCE_KEY,
    AdapterConfig,
    AdapterContent,
    Provenance,
)
from bestiary.diffusion.adapter_kinds import family_of, kind_of
from bestiary.diffusion.stored_adapter import StoredAdapter, broken_config, open_adapter, read_object, too_large
from bestiary.errors import BestiaryError, shown

KOHYA_PREFIX = "lora_unet_"
# Module names of the UNet that contain underscores themselves: kohya replaces the dots between names by underscores.
COMPOUND_NAMES = (
    "down_blocks|up_blocks|mid_block|transformer_blocks|to_q|to_k|to_v|to_out|proj_in|proj_out|time_emb_proj|"
    "conv_in|conv_out|conv_shortcut|time_embedding|linear_1|linear_2"
)
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
WEIGHT_TYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
MAX_TARGETS = 2000  # a UNet of SDXL's size has 1,500 modules that can be adapted
SUPPORTED_FAMILIES = ("Stable Diffusion 1.x", "Stable Diffusion 2.x")
ORIGINAL_RANK, ORIGINAL_ALPHA = 2, 16.0  # of the original system, whose files store neither

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


class StoredConfig(BaseModel):
    """The fields of a LoRA config that are read, each where it is given."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    r: int | None = Field(default=None, ge=1, le=MAX_RANK_OR_ALPHA)
    lora_alpha: int | float | None = Field(default=None, ge=-MAX_RANK_OR_ALPHA, le=MAX_RANK_OR_ALPHA)
    target_modules: list[str] | str | None = None
    lora_dropout: int | float = Field(default=0.0, ge=0, le=1)
    use_rslora: bool = False
    use_dora: bool = False


def read_adapter(
    file: Path, *, alpha: float | None = None, original_alpha: float | None = None, family: str | None = None
) -> AdapterContent:
    """Read an adapter's file in any of the formats.

    `alpha` is for files that do not store their own, `original_alpha` for those of the original system, and `family` is
    the base's, if it is known already.
    Raises BestiaryError when the file is not a complete LoRA of a UNet of this family, when its alpha is unknown, or
    stored although `alpha` is given, and when its config holds something that is not understood.
    """
    stored = open_adapter(file)
    fields = _config_fields(stored)
    config = _check_config(fields, file)
    provenance = _provenance(stored)
    _check_family(stored, family)
    weights, alphas = _named_weights(stored)
    _check_weights(weights, file)
    modules = _adapted_modules(weights, file)
    rank = _rank(weights, modules, config, file)
    rule = None
    known = _stored_alpha(alphas, modules, config, rank, file)
    if known is None:
        known, rule = (alpha, "given") if alpha is not None else _alpha_by_rule(stored, weights, rank, original_alpha)
    elif alpha is not None:
        raise BestiaryError(f"{file} stores its alpha, {known:g}, so --alpha {alpha:g} is not used. Leave it out.")
    complete = AdapterConfig(
        r=rank,
        lora_alpha=known,
        target_modules=_targets(fields, config.target_modules, modules),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
    return AdapterContent(weights, complete, provenance, rule, few_step=_is_few_step(stored, provenance))


# ---- the config ----


def _config_fields(stored: StoredAdapter) -> dict[str, Any]:  # untrusted JSON
    """The LoRA config of the UNet, from wherever the file keeps it."""
    fields = dict(stored.peft_config)
    fields |= read_object(stored.metadata.get(KOHYA_CONFIG_KEY), stored.path, KOHYA_CONFIG_KEY)
    header = read_object(stored.metadata.get(CONFIG_KEY), stored.path, CONFIG_KEY)
    return fields | {
        key.removeprefix(PREFIX): value for key, value in header.items() if key.startswith(PREFIX) or "." not in key
    }


def _check_config(fields: Mapping[str, Any], file: Path) -> StoredConfig:
    """The fields that are read. Raises BestiaryError for one that could change the effect and is not understood."""
    targets = fields.get("target_modules")
    if isinstance(targets, list) and len(targets) > MAX_TARGETS:
        raise too_large(file, f"its number of target_modules, {len(targets):,},", f"{MAX_TARGETS:,}")
    try:
        config = StoredConfig.model_validate(dict(fields))
    except ValidationError as error:
        field = shown(str(error.errors(include_url=False)[0]["loc"][0]))
        raise broken_config(file, f"{field} has no usable value") from None
    for pattern in ("rank_pattern", "alpha_pattern"):
        if fields.get(pattern):
            raise BestiaryError(
                f"{file} gives its modules different ranks or alphas ({pattern}), which is not supported."
            )
    for field, value in fields.items():
        if field in HARMLESS_FIELDS | READ_FIELDS or value is None or value is False or value in ("", [], {}):
            continue
        if value not in HARMLESS_VALUES.get(field, ()):
            raise BestiaryError(
                f"{file} sets {shown(field)} to {shown(repr(value), 40)}, which may change its effect and is not "
                "supported. Merge the adapter with the program that made it, or train it without this setting."
            )
    return config


def _provenance(stored: StoredAdapter) -> Provenance:
    try:
        return Provenance.model_validate(read_object(stored.metadata.get(PROVENANCE_KEY), stored.path, PROVENANCE_KEY))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise broken_config(stored.path, f"{shown(str(first['loc'][0]))}: {first['msg'].lower()}") from None


def _targets(fields: Mapping[str, Any], listed: list[str] | str | None, modules: Iterable[str]) -> list[str]:
    """The stored targets if they can be what the weights are for, otherwise the modules that have weights.

    A regular expression, an exclusion or a choice of layers is not evaluated: the weights are their result.
    """
    if isinstance(listed, list) and not any(
        fields.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern")
    ):
        names = set(listed)
        if listed and all(is_target(module, names) for module in modules):
            return listed
    return sorted(modules)


def is_target(module: str, targets: set[str] | frozenset[str]) -> bool:
    """Whether PEFT adapts this module for these targets: its name equals one or ends in `.target`."""
    parts = module.split(".")
    return any(".".join(parts[start:]) in targets for start in range(len(parts)))


# ---- the weights ----


def _check_family(stored: StoredAdapter, family: str | None) -> None:
    """Raise BestiaryError for an adapter of another model, or of another kind than LoRA."""
    shapes = {name: tuple(value.shape) for name, value in stored.tensors.items()}
    made_for = family_of(shapes)
    if made_for and made_for not in ([family] if family else SUPPORTED_FAMILIES):
        raise BestiaryError(
            f"{stored.path}: This adapter is for {made_for}; this base is {family or SUPPORTED_FAMILIES[0]}."
        )
    if kind := kind_of(shapes):
        raise BestiaryError(f"{stored.path} is {kind.name}, which is not supported: it holds {shown(kind.key, 160)}.")


def _named_weights(stored: StoredAdapter) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The weights by the UNet's own names, and the alphas by module, where each module has its own."""
    weights: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for key, value in stored.tensors.items():
        name = _weight_name(key, stored.path)
        if name in weights or name in alphas:
            raise BestiaryError(f"{stored.path} holds {shown(name)} twice, under two names.")
        if not name.endswith(".alpha"):
            weights[name] = value
        elif value.numel() != 1 or value.dtype not in WEIGHT_TYPES | {torch.int32, torch.int64}:
            raise BestiaryError(f"{stored.path} holds {shown(key)}, which is no number. Get another copy of the file.")
        else:
            alphas[name] = float(value)
    return weights, alphas


def _weight_name(key: str, file: Path) -> str:
    """The name of a weight, the same for all formats: `down_blocks.0....to_q.lora_A.weight`."""
    name = key
    if key.startswith(KOHYA_PREFIX):
        module, _, rest = key.removeprefix(KOHYA_PREFIX).partition(".")
        if not re.match(r"(down_blocks|up_blocks|mid_block|conv|time)_", module):
            raise BestiaryError(
                f"{file} names modules as the first Stable Diffusion code did ({shown(key)}), which is not supported."
            )
        parts = re.sub(COMPOUND_NAMES, lambda found: found[0].replace("_", "\0"), module).replace("_", ".")
        name = f"{parts.replace(chr(0), '_')}.{rest}"
    name = name.removeprefix(PREFIX).removeprefix("base_model.model.").replace(".default.", ".")
    # Before 0.22, diffusers kept the LoRA in the processors of the attention.
    name = re.sub(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.", _from_processor, name)
    name = re.sub(r"\.(?:lora\.down|lora_down)\.weight$", DOWN, name)
    name = re.sub(r"\.(?:lora\.up|lora_up)\.weight$", UP, name)
    in_unet = re.match(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding)\.", name)
    if not in_unet or not name.endswith((DOWN, UP, ".lora_magnitude_vector", ".alpha")):
        raise BestiaryError(f"{file} holds more than a UNet's LoRA, which is not supported: {shown(key, 160)}.")
    return name


def _from_processor(found: re.Match[str]) -> str:
    return f".to_{found[1]}{'.0' if found[1] == 'out' else ''}.lora.{found[2]}."


def _check_weights(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Raise BestiaryError when a weight is not finite, or of a type that a UNet cannot take without loss."""
    for key, weight in weights.items():
        if weight.dtype not in WEIGHT_TYPES:
            raise BestiaryError(f"{file} holds {key} as {str(weight.dtype).removeprefix('torch.')}: not supported.")
        if not torch.isfinite(weight).all():
            raise BestiaryError(f"{file} holds values that are not finite numbers: {key}.")


def _adapted_modules(weights: Mapping[str, torch.Tensor], file: Path) -> list[str]:
    """The modules that have weights. Raises BestiaryError when one of them has only half of its weights."""
    halves = [{key.removesuffix(half) for key in weights if key.endswith(half)} for half in (DOWN, UP)]
    if halves[0] != halves[1]:
        raise BestiaryError(f"{file} is incomplete: it holds only one half of {shown(min(halves[0] ^ halves[1]))}.")
    if not halves[0]:
        raise BestiaryError(f"{file} holds no LoRA weights.")
    return sorted(halves[0])


def _rank(weights: Mapping[str, torch.Tensor], modules: Sequence[str], config: StoredConfig, file: Path) -> int:
    """The rank that all modules share."""
    ranks: dict[int, str] = {}
    for module in modules:
        down, up = weights[module + DOWN], weights[module + UP]
        if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1]:
            raise BestiaryError(f"{file} is broken: the two halves of {shown(module)} have different ranks.")
        ranks.setdefault(int(down.shape[0]), module)
    if len(ranks) > 1:
        if any(weights[module + DOWN].ndim == 4 and weights[module + DOWN].shape[-1] > 1 for module in modules):
            raise BestiaryError(f"{file} is a LoCon, whose convolutions have a rank of their own: not supported.")
        raise BestiaryError(f"{file} gives its modules different ranks or alphas, which is not supported.")
    (rank,) = ranks
    if not 1 <= rank <= MAX_RANK_OR_ALPHA:
        raise BestiaryError(f"{file} is broken: its weights have the rank {rank}.")
    if config.r is not None and config.r != rank:
        raise BestiaryError(f"{file} is broken: its config says r = {config.r}, its weights have the rank {rank}.")
    return rank


# ---- the alpha ----


def _stored_alpha(
    alphas: Mapping[str, float], modules: Sequence[str], config: StoredConfig, rank: int, file: Path
) -> float | int | None:
    """The alpha that the file stores, in its config or for each module; None when it stores none."""
    if not alphas:
        return config.lora_alpha
    if alphas.keys() != {f"{module}.alpha" for module in modules} or len(set(alphas.values())) > 1:
        raise BestiaryError(f"{file} gives its modules different ranks or alphas, which is not supported.")
    (alpha,) = set(alphas.values())
    if not 0 < abs(alpha) <= MAX_RANK_OR_ALPHA:
        raise BestiaryError(f"{file} stores the alpha {alpha:g}, which programs read differently: not supported.")
    if config.lora_alpha is None:
        return alpha
    # An alpha beside a module is divided by the rank, as kohya's tools do; the config's may be for rsLoRA.
    expected = float(config.lora_alpha) * (rank**0.5 if config.use_rslora else 1.0)
    if abs(alpha - expected) > 1e-3 * abs(expected):
        raise BestiaryError(f"{file} stores two alphas: {alpha:g} beside its weights and {expected:g} in its config.")
    return config.lora_alpha


def _alpha_by_rule(
    stored: StoredAdapter, weights: Mapping[str, torch.Tensor], rank: int, original_alpha: float | None
) -> tuple[float | int, str]:
    """The alpha that a producer means by storing none, and the sentence that says so."""
    producer = _producer(stored.tensors, rank, pickled=stored.pickled)
    if producer == "kohya":
        return rank, f"kohya's tools store no alpha when it is the rank, {rank}"
    if producer == "diffusers":
        return rank, f"diffusers' training scripts store no alpha when it is the rank, {rank}"
    if producer == "original" and original_alpha is not None:
        return original_alpha, f"the original system does not store its alpha, which was {original_alpha:g}"
    if stored.pickled and original_alpha is None:
        raise BestiaryError(
            f"{stored.path} is a torch pickle: convert it with `bestiary adapter convert`. It does not store its alpha."
        )
    raise BestiaryError(
        f"{stored.path} does not store its alpha, and its keys do not tell which program made it. "
        "Give the alpha with `bestiary adapter convert --alpha`."
    )


def _producer(keys: Iterable[str], rank: int, *, pickled: bool) -> Literal["kohya", "diffusers", "original"] | None:
    keys = list(keys)
    if all(key.startswith(KOHYA_PREFIX) for key in keys):
        return "kohya"
    if all(re.search(r"[._]lora\.(down|up)\.weight$", key) for key in keys):
        return "diffusers"
    # The original system pickled the state of PEFT's model as it was, with the name of the adapter in each key.
    if (
        pickled
        and rank == ORIGINAL_RANK
        and all(re.match(r"base_model\.model\..*\.lora_[AB]\.default\.weight$", key) for key in keys)
    ):
        return "original"
    return None


def _is_few_step(stored: StoredAdapter, provenance: Provenance) -> bool:
    """Whether a name in or of the file says LCM-LoRA (arXiv:2311.05556): its weights look like any other adapter's."""
    if provenance.data_sha256:  # this project trained it on images
        return False
    named = [stored.path.stem]
    if stored.path.stem == FILE_NAME.partition(".")[0]:  # as published: the folder has the adapter's name
        named.append(stored.path.parent.name)
    named += [stored.metadata.get(key, "") for key in ("ss_output_name", "modelspec.title")]
    return any(re.search(r"(?<![a-z])lcm(?![a-z])", name[:1000].lower()) for name in named)
