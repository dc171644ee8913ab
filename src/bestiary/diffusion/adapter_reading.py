"""Read an adapter that any program wrote: diffusers, PEFT, kohya, LyCORIS, OneTrainer, ComfyUI, the original system.

A file says little of who wrote it, so the producer is known by its keys, and decides what a missing alpha means. What
would change the effect and is not understood is refused by name: a wrong strength draws pictures that look plausible.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from bestiary.diffusion.adapter_config import ConfigFields, StoredConfig, check_config, config_fields, targets
from bestiary.diffusion.adapter_format import (
    FEW_STEP_KEY,
    FILE_NAME,
    MAX_RANK_OR_ALPHA,
    PART_NAMES,
    PROVENANCE_KEY,
    AdapterConfig,
    AdapterContent,
    Part,
    Provenance,
    spread,
)
from bestiary.diffusion.adapter_kinds import family_of, kind_of
from bestiary.diffusion.adapter_names import JOINED_PREFIXES, tensor_name
from bestiary.diffusion.few_step import few_step_sampling
from bestiary.diffusion.stored_adapter import StoredAdapter, broken_config, open_adapter, read_object
from bestiary.diffusion.weight_changes import LORA, WeightChange, scales_output
from bestiary.errors import BestiaryError, shown
from bestiary.samplers import Sampling, sampling_from_json

WEIGHT_TYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
SUPPORTED_FAMILIES = ("Stable Diffusion 1.x", "Stable Diffusion 2.x")
ORIGINAL_RANK, ORIGINAL_ALPHA = 2, 16.0  # of the original system, whose files store neither
MAGNITUDE = "lora_magnitude_vector"  # DoRA's lengths as PEFT stores them
STORE_NO_ALPHA: dict[str | None, str] = {
    "kohya": "kohya's tools store",
    "diffusers": "diffusers' training scripts store",
    "comfyui": "ComfyUI stores",
}
ALPHA_TYPES = WEIGHT_TYPES | {torch.int32, torch.int64}

Tensors = dict[str, torch.Tensor]  # of one module, by their names in `adapter_names`
Alphas = dict[str, float | int]  # by module


@dataclass(frozen=True)
class Asked:
    """The alphas that a caller gives: for files without one, and for those of the original system."""

    alpha: float | None = None
    original: float | None = None


def read_adapter(
    file: Path, *, alpha: float | None = None, original_alpha: float | None = None, family: str | None = None
) -> AdapterContent:
    """Read an adapter's file in any of the formats.

    `alpha` is for files that do not store their own, `original_alpha` for those of the original system, and `family` is
    the base's, if it is known already.
    Raises BestiaryError when the file is not a complete adapter of a Stable Diffusion of this family, when its alpha is
    unknown, or stored although `alpha` is given, and when its config holds something that is not understood.
    """
    stored = open_adapter(file)
    fields = config_fields(stored, _parts_of(stored.tensors))
    configs = {part: check_config(of_part, file) for part, of_part in fields.items()}
    provenance = _provenance(stored)
    _check_family(stored, family)
    modules = _named_tensors(stored)
    asked = Asked(alpha, original_alpha)
    loras: dict[Part, _Lora] = {}
    changes: dict[tuple[Part, str], WeightChange] = {}
    for part in PART_NAMES:
        plain, others = _split_kinds(modules[part], file)
        loras[part] = _lora(plain, fields[part], configs[part], stored, asked)
        changes |= {(part, module): _change(module, tensors, file, asked) for module, tensors in others.items()}
    if not any(lora.weights for lora in loras.values()) and not changes:
        raise BestiaryError(f"{file} holds no LoRA weights.")
    unet, text = loras["unet"], loras["text_encoder"]
    return AdapterContent(
        unet.weights,
        unet.config or AdapterConfig(r=1, lora_alpha=1, target_modules=[]),
        provenance,
        unet.rule or text.rule,
        few_step=_few_step(stored, provenance),
        text_weights=text.weights,
        text_config=text.config,
        changes=changes,
    )


def _provenance(stored: StoredAdapter) -> Provenance:
    try:
        return Provenance.model_validate(read_object(stored.metadata.get(PROVENANCE_KEY), stored.path, PROVENANCE_KEY))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise broken_config(stored.path, f"{shown(str(first['loc'][0]))}: {first['msg'].lower()}") from None


# ---- the tensors ----


def _check_family(stored: StoredAdapter, family: str | None) -> None:
    """Raise BestiaryError for an adapter of another model, or of a kind that is not supported."""
    shapes = {name: tuple(value.shape) for name, value in stored.tensors.items()}
    made_for = family_of(shapes)
    if made_for and made_for not in ([family] if family else SUPPORTED_FAMILIES):
        raise BestiaryError(
            f"{stored.path}: This adapter is for {made_for}; this base is {family or SUPPORTED_FAMILIES[0]}."
        )
    if kind := kind_of(shapes):
        raise BestiaryError(f"{stored.path} is {kind.name}, which is not supported: it holds {shown(kind.key, 160)}.")


def _parts_of(keys: Iterable[str]) -> list[Part]:
    """The parts that the keys of a file are for."""
    found = {name.part for key in keys if (name := tensor_name(key))}
    return [part for part in PART_NAMES if part in found]


def _named_tensors(stored: StoredAdapter) -> dict[Part, dict[str, Tensors]]:
    """The tensors by part and module. Raises BestiaryError for one that is unknown, or that no weight can be."""
    modules: dict[Part, dict[str, Tensors]] = {part: {} for part in PART_NAMES}
    for key, value in stored.tensors.items():
        name = tensor_name(key)
        if name is None:
            raise BestiaryError(
                f"{stored.path} holds more than an adapter of the UNet and the text encoder, which is not supported: "
                f"{shown(key, 160)}."
            )
        tensors = modules[name.part].setdefault(name.module, {})
        if name.field in tensors:
            raise BestiaryError(f"{stored.path} holds {shown(f'{name.module}.{name.field}')} twice, under two names.")
        _check_tensor(key, value, name.field, stored.path)
        tensors[name.field] = value
    return modules


def _check_tensor(key: str, value: torch.Tensor, field: str, file: Path) -> None:
    """Raise BestiaryError for a value that is not finite, or of a type that a UNet cannot take without loss."""
    if field == "alpha":
        if value.numel() != 1 or value.dtype not in ALPHA_TYPES:
            raise BestiaryError(f"{file} holds {shown(key)}, which is not a number. Get another copy of the file.")
    elif value.dtype not in WEIGHT_TYPES:
        raise BestiaryError(
            f"{file} holds {shown(key, 160)} as {str(value.dtype).removeprefix('torch.')}, "
            "which is not supported. Save it as float32, float16 or bfloat16."
        )
    elif not torch.isfinite(value).all():
        raise BestiaryError(
            f"{file} holds values that are not finite numbers: {shown(key, 160)}. Get another copy of the file."
        )


def _split_kinds(modules: Mapping[str, Tensors], file: Path) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    """The modules that PEFT applies, LoRA or DoRA, and those of other kinds.

    DoRA in kohya's layout becomes PEFT's if all modules have it in the way that PEFT knows. A bias that is changed
    beside a LoRA is a change of its own.
    """
    plain, others = {}, {}
    for module, tensors in modules.items():
        weight = {name: value for name, value in tensors.items() if name not in ("diff_b", "b_norm")}
        if weight.keys() <= LORA | {"alpha", "dora_scale", MAGNITUDE}:
            plain[module] = weight
            weight = {}
        rest = weight | {name: tensors[name] for name in ("diff_b", "b_norm") if name in tensors}
        if rest:
            others[module] = rest
    plain = {module: tensors for module, tensors in plain.items() if tensors}
    for module, tensors in plain.items():
        _check_halves(module, tensors, file)
    scaled = {module for module, tensors in plain.items() if "dora_scale" in tensors}
    if scaled == plain.keys() and all(_is_pefts_dora(tensors) for tensors in plain.values()):
        return {module: _as_pefts_dora(tensors) for module, tensors in plain.items()}, others
    others |= {module: plain[module] | others.get(module, {}) for module in scaled}
    return {module: tensors for module, tensors in plain.items() if module not in scaled}, others


def _check_halves(module: str, tensors: Tensors, file: Path) -> None:
    """Raise BestiaryError when a module's LoRA lacks a half, or the halves do not have one rank."""
    if not tensors.keys() >= LORA:
        raise BestiaryError(
            f"{file} is incomplete: it holds only one half of {shown(module)}. Get another copy of the file."
        )
    down, up = tensors["lora_A.weight"], tensors["lora_B.weight"]
    if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1]:
        raise BestiaryError(
            f"{file} is broken: the two halves of {shown(module)} have different ranks. Get another copy of the file."
        )
    if not 1 <= down.shape[0] <= MAX_RANK_OR_ALPHA:
        raise BestiaryError(f"{file} is broken: its weights have the rank {down.shape[0]}.")


def _is_pefts_dora(tensors: Tensors) -> bool:
    outputs, length = tensors["lora_B.weight"].shape[0], tensors["dora_scale"]
    return scales_output(length, outputs) and length.numel() == outputs and MAGNITUDE not in tensors


def _as_pefts_dora(tensors: Tensors) -> Tensors:
    length = tensors["dora_scale"]
    shape = (-1,) if tensors["lora_A.weight"].ndim == 2 else (1, -1, 1, 1)
    kept = {name: value for name, value in tensors.items() if name != "dora_scale"}
    return kept | {MAGNITUDE: length.reshape(shape)}


def _change(module: str, tensors: Tensors, file: Path, asked: Asked) -> WeightChange:
    """The change of one module. Raises BestiaryError when it is incomplete, or its alpha is unknown."""
    alpha = tensors.get("alpha")
    change = WeightChange(
        {name: value for name, value in tensors.items() if name != "alpha"}, None if alpha is None else float(alpha)
    )
    if not change.is_complete:
        names = ", ".join(sorted(change.tensors)) or "an alpha"
        raise BestiaryError(f"{file} is incomplete: of {shown(module)} it holds only {names}.")
    if change.rank is None:
        return change
    if change.alpha is None:
        if asked.alpha is None:
            raise BestiaryError(
                f"{file} does not store the alpha of {shown(module)}, a {change.kind}. Give it with "
                "`bestiary adapter convert --alpha`."
            )
        return WeightChange(change.tensors, asked.alpha)
    _check_alpha(change.alpha, file)
    if asked.alpha is not None:
        raise _two_alphas(file, [change.alpha], asked.alpha)
    return change


# ---- the LoRA of one part ----


@dataclass(frozen=True)
class _Lora:
    weights: dict[str, torch.Tensor]
    config: AdapterConfig | None = None
    rule: str | None = None


def _lora(
    modules: Mapping[str, Tensors], fields: ConfigFields, config: StoredConfig, stored: StoredAdapter, asked: Asked
) -> _Lora:
    """The LoRA of one part with a complete config."""
    if not modules:
        return _Lora({})
    file, rule = stored.path, None
    ranks = {module: int(tensors["lora_A.weight"].shape[0]) for module, tensors in modules.items()}
    for module, rank in ranks.items():
        expected = config.rank_of(module, file)
        if expected is not None and expected != rank:
            raise BestiaryError(
                f"{file} is broken: its config says r = {expected}, its weights have the rank {rank} ({shown(module)})."
            )
    alphas = _stored_alphas(modules, ranks, config, file)
    if alphas is None:
        rule = "given"
        alphas = {module: asked.alpha for module in ranks if asked.alpha is not None}
        if not alphas:
            alphas, rule = _alphas_by_rule(stored, ranks, asked.original)
    elif asked.alpha is not None:
        raise _two_alphas(file, alphas.values(), asked.alpha)
    weights = {
        f"{module}.{name}": value
        for module, tensors in modules.items()
        for name, value in tensors.items()
        if name != "alpha"
    }
    r = config.r if config.r is not None else _usual(ranks.values())
    alpha = config.lora_alpha if config.lora_alpha is not None else _usual(alphas.values())
    complete = AdapterConfig(
        r=int(r),
        lora_alpha=alpha,
        target_modules=targets(fields, config, modules),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora or any(MAGNITUDE in tensors for tensors in modules.values()),
        rank_pattern={module: rank for module, rank in sorted(ranks.items()) if rank != r},
        alpha_pattern={module: value for module, value in sorted(alphas.items()) if value != alpha},
    )
    return _Lora(weights, complete, rule)


def _usual(values: Iterable[float | int]) -> float | int:
    """The most frequent of the values; of several, the lowest."""
    return max(sorted(Counter(values).items()), key=lambda counted: counted[1])[0]


# ---- the alpha ----


def _stored_alphas(
    modules: Mapping[str, Tensors], ranks: Mapping[str, int], config: StoredConfig, file: Path
) -> Alphas | None:
    """The alphas that the file stores, in its config or for each module; None when it stores none."""
    in_config = {module: alpha for module in modules if (alpha := config.alpha_of(module, file)) is not None}
    beside = {module: float(tensors["alpha"]) for module, tensors in modules.items() if "alpha" in tensors}
    if not beside:
        return in_config if len(in_config) == len(modules) else None
    if missing := sorted(modules.keys() - beside.keys()):
        raise BestiaryError(
            f"{file} stores an alpha for {len(beside)} of its {len(modules)} modules, and none for "
            f"{shown(missing[0])}. Programs read such files differently, so save it with an alpha for each module."
        )
    for module, alpha in beside.items():
        _check_alpha(alpha, file)
        if module in in_config:
            # An alpha beside a module is divided by the rank, as kohya's tools do; the config's may be for rsLoRA.
            expected = float(in_config[module]) * (ranks[module] ** 0.5 if config.use_rslora else 1.0)
            if abs(alpha - expected) > 1e-3 * abs(expected):
                raise BestiaryError(
                    f"{file} stores two alphas: {alpha:g} beside its weights and {expected:g} in its config. "
                    "Correct the wrong one."
                )
    return beside | in_config


def _two_alphas(file: Path, stored: Iterable[float], given: float) -> BestiaryError:
    return BestiaryError(f"{file} stores its alpha, {spread(stored)}, so leave out --alpha {given:g}.")


def _check_alpha(alpha: float, file: Path) -> None:
    if not 0 < abs(alpha) <= MAX_RANK_OR_ALPHA:
        raise BestiaryError(f"{file} stores the alpha {alpha:g}, which programs read differently: not supported.")


def _alphas_by_rule(
    stored: StoredAdapter, ranks: Mapping[str, int], original_alpha: float | None
) -> tuple[Alphas, str]:
    """The alphas that a producer means by storing none, and the sentence that says so."""
    producer = _producer(stored.tensors, ranks.values(), pickled=stored.pickled)
    if producer in STORE_NO_ALPHA:
        return dict(ranks), f"{STORE_NO_ALPHA[producer]} no alpha when it is the rank, {spread(ranks.values())}"
    if producer == "original" and original_alpha is not None:
        rule = f"the original system does not store its alpha, which was {original_alpha:g}"
        return dict.fromkeys(ranks, original_alpha), rule
    if stored.pickled and original_alpha is None:
        raise BestiaryError(
            f"{stored.path} is a torch pickle: convert it with `bestiary adapter convert`. It does not store its alpha."
        )
    raise BestiaryError(
        f"{stored.path} does not store its alpha, and its keys do not tell which program made it. "
        "Give the alpha with `bestiary adapter convert --alpha`."
    )


def _producer(
    keys: Iterable[str], ranks: Iterable[int], *, pickled: bool
) -> Literal["kohya", "diffusers", "comfyui", "original"] | None:
    keys = list(keys)
    if all(key.startswith(JOINED_PREFIXES) for key in keys):
        return "kohya"
    if all(re.search(r"[._](lora|lora_linear_layer)\.(down|up)\.weight$", key) for key in keys):
        return "diffusers"
    if all(key.startswith(("diffusion_model.", "text_encoders.clip_l.")) for key in keys):
        return "comfyui"
    # The original system pickled the state of PEFT's model as it was, with the name of the adapter in each key.
    if (
        pickled
        and set(ranks) == {ORIGINAL_RANK}
        and all(re.match(r"base_model\.model\..*\.lora_[AB]\.default\.weight$", key) for key in keys)
    ):
        return "original"
    return None


def _few_step(stored: StoredAdapter, provenance: Provenance) -> Sampling | None:
    """How to draw with the adapter, if its file or its name says that it is a few-step adapter."""
    if text := stored.metadata.get(FEW_STEP_KEY):
        try:
            return sampling_from_json(text)
        except ValueError:
            raise broken_config(stored.path, f"{FEW_STEP_KEY} does not say how to draw") from None
    if provenance.data_sha256:  # this project trained it on images
        return None
    named = [stored.path.stem]
    if stored.path.stem == FILE_NAME.partition(".")[0]:  # as published: the folder has the adapter's name
        named.append(stored.path.parent.name)
    return few_step_sampling([*named, *(stored.metadata.get(key, "") for key in ("ss_output_name", "modelspec.title"))])
