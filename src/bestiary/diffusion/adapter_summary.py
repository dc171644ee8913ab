"""What an adapter's file holds and what a base would take of it, as a table, also of a file that is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bestiary.diffusion.adapter import adapter_sha256, base_family, fit
from bestiary.diffusion.adapter_format import PART_NAMES, AdapterContent, Part
from bestiary.diffusion.adapter_kinds import family_of
from bestiary.diffusion.adapter_names import tensor_name
from bestiary.diffusion.adapter_reading import read_adapter
from bestiary.diffusion.base import load_text, load_unet
from bestiary.diffusion.stored_adapter import SETTINGS, StoredAdapter, deciding_files, open_adapter
from bestiary.errors import BestiaryError, shown

Rows = list[tuple[str, str]]
# The fields of trainers that say most, in the order in which they are shown: kohya's (ss_), ModelSpec's, OneTrainer's.
TRAINER_FIELDS = (
    "modelspec.title", "modelspec.architecture", "modelspec.author", "modelspec.date", "modelspec.trigger_phrase",
    "ss_output_name", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    "ss_base_model_version", "ss_sd_model_name", "ss_resolution", "ss_num_train_images", "ss_epoch", "ss_steps",
    "ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr", "ss_optimizer", "ss_training_comment", "ot_branch",
    "ot_revision", "software",
)  # fmt: skip
MAX_VALUE = 100  # characters of a value
MAX_COUNTS = 6  # different ranks that are listed


@dataclass(frozen=True)
class BaseToTry:
    """The base that an adapter would be applied to, and how it is shown."""

    model: str
    revision: str | None
    name: str


def summarize(file: Path, base: BaseToTry | None) -> Rows:
    """Labels and values: the file, what it holds, what its trainer says, and what would be applied to `base`.

    Raises BestiaryError only when the file cannot be opened at all.
    """
    stored = open_adapter(file)
    rows = [
        ("file", str(file)),
        ("size", f"{sum(part.stat().st_size for part in deciding_files(file)) / 2**20:.2f} MiB"),
        ("sha256", adapter_sha256(file)),
        ("stored as", "torch pickle" if stored.pickled else "safetensors"),
        ("family", _family(stored)),
        ("tensors", f"{len(stored.tensors)} in {_counted(_dtype(value) for value in stored.tensors.values())}"),
    ]
    try:
        content = read_adapter(file)
    except BestiaryError as error:
        rows += [*_modules_by_name(stored), *_trainer(stored.metadata)]
        return [*rows, ("would be applied", f"nothing. {_sentence(error, file)}")]
    rows += _content(content)
    rows += _trainer(stored.metadata)
    if base is None:
        return [*rows, ("would be applied", "unknown without a base. Name one with --base.")]
    return [*rows, ("base", shown(base.name, MAX_VALUE)), ("would be applied", _applied(file, content, base))]


def _family(stored: StoredAdapter) -> str:
    shapes = {name: tuple(value.shape) for name, value in stored.tensors.items()}
    if family := family_of(shapes):
        return family
    known = all(tensor_name(key) for key in shapes)
    return "Stable Diffusion 1.x or 2.x, by its names" if known else "unknown"


def _content(content: AdapterContent) -> Rows:
    rows = [(f"{PART_NAMES[part]}", _part(content, part)) for part in content.parts]
    rows += [("ranks", _counted(content.ranks)), ("alphas", _counted(f"{alpha:g}" for alpha in content.alphas))]
    if content.alpha_rule:
        rows.append(("alpha is assumed", content.alpha_rule))
    if sampling := content.few_step:
        guidance = f"guidance {sampling.guidance_scale:g}" if sampling.guidance_scale > 1 else "no guidance"
        rows.append(("few-step adapter", f"{sampling.steps} steps of the sampler {sampling.sampler}, {guidance}"))
    if content.provenance.base:
        rows.append(("trained on", shown(content.provenance.base, MAX_VALUE)))
    return rows


def _part(content: AdapterContent, part: Part) -> str:
    weights, config = content.lora(part)
    lora = "DoRA" if config and config.use_dora else "rsLoRA" if config and config.use_rslora else "LoRA"
    plain = {key.rsplit(".lora_", 1)[0] for key in weights}
    kinds = [lora] * len(plain) + [change.kind for (of, _), change in content.changes.items() if of == part]
    return f"{_modules(len(content.modules(part)))}: {_counted(kinds)}"


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"


def _modules_by_name(stored: StoredAdapter) -> Rows:
    """The modules of a file that cannot be applied, as far as their names are known."""
    names = [name for key in stored.tensors if (name := tensor_name(key))]
    rows = [
        (PART_NAMES[part], _modules(len({name.module for name in names if name.part == part})))
        for part in PART_NAMES
        if any(name.part == part for name in names)
    ]
    unknown = [key for key in stored.tensors if not tensor_name(key)]
    if unknown:
        rows.append(("other tensors", f"{len(unknown)}, for example {shown(unknown[0], MAX_VALUE)}"))
    return rows


def _trainer(metadata: Mapping[str, str]) -> Rows:
    known = [(key, shown(metadata[key], MAX_VALUE)) for key in TRAINER_FIELDS if metadata.get(key)]
    others = [key for key in metadata if key not in (*TRAINER_FIELDS, *SETTINGS, "format")]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        known.append(("other metadata", shown(", ".join(sorted(others)[:5]), MAX_VALUE) + more))
    return known


def _applied(file: Path, content: AdapterContent, base: BaseToTry) -> str:
    """What the base would take of the adapter: everything, or nothing."""
    unet = load_unet(base.model, base.revision)
    networks: dict[Part, torch.nn.Module] = {"unet": unet}
    if "text_encoder" in content.parts:
        networks["text_encoder"] = load_text(base.model, base.revision)[1]
    try:
        read_adapter(file, family=base_family(unet))
    except BestiaryError as error:
        return f"nothing. {_sentence(error, file)}"
    if problem := fit(networks, content):
        return f"nothing. It does not fit: {problem}."
    counts = [(len(content.modules(part)), PART_NAMES[part]) for part in content.parts]
    total = sum(count for count, _ in counts)
    return f"{total} of {total} modules: {', '.join(f'{count} of the {part}' for count, part in counts)}"


def _sentence(error: BestiaryError, file: Path) -> str:
    return str(error).removeprefix(f"{file}: ")


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _counted(values: Iterable[object]) -> str:
    """The different values, the most frequent first, each with how often it comes if there are several.

    >>> _counted([4, 8, 4]), _counted(["float16"])
    ('4 (2), 8 (1)', 'float16')
    """
    counts = Counter(map(str, values)).most_common()
    if len(counts) <= 1:
        return counts[0][0] if counts else "none"
    more = f" and {len(counts) - MAX_COUNTS} others" if len(counts) > MAX_COUNTS else ""
    return ", ".join(f"{value} ({count})" for value, count in counts[:MAX_COUNTS]) + more
