"""Merge adapters into one, and lower an adapter's rank: W + sum of weight * scale * B A stays the same, or close to it.

The exact merge stacks the A's and the B's, so its rank is the sum of the ranks. A lower rank keeps the largest singular
values of each module's change (Eckart and Young 1936) and says how much of the change is lost.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bestiary.diffusion.adapter import Verification, adapter_sha256, verify_adapter
from bestiary.diffusion.adapter_format import CONTAINS, DOWN, UP, AdapterConfig, AdapterContent, Part, Provenance
from bestiary.diffusion.adapter_reading import read_adapter
from bestiary.diffusion.containment import Named, check_counted_once, contained
from bestiary.errors import BestiaryError
from bestiary.files import check_not_overwritten, write_atomically

PARTS: tuple[Part, ...] = ("unet", "text_encoder")
Module = tuple[Part, str]
Factors = Mapping[Module, tuple[torch.Tensor, torch.Tensor]]  # A (r, in, ...) and the scaled B (out, r, ...)


@dataclass(frozen=True)
class Parent:
    """An adapter to merge: its name for errors and the provenance, its file, and its weight."""

    name: str
    file: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Merged:
    """A merged adapter, and the error that its rank makes: the norm of what is lost over the norm of the change."""

    content: AdapterContent
    error: float = 0.0  # of all modules together
    largest_error: float = 0.0  # of one module
    worst_module: str | None = None  # the one with the largest error


def merge(parents: Sequence[Parent], rank: int | None = None) -> Merged:
    """One adapter that does what the parents do together with their weights: exactly, or at this rank.

    It is drawn at the timesteps of a parent that was distilled for them.
    Raises BestiaryError when a parent is no plain LoRA, has the weight 0 or is contained in another one, when two
    parents were trained on different bases, and when the rank is not below that of the exact merge.
    """
    contents = [read_adapter(parent.file) for parent in parents]
    check_counted_once(
        [
            Named.of(parent.name, adapter_sha256(parent.file), content)
            for parent, content in zip(parents, contents, strict=True)
        ]
    )
    stacked = _stack([_factors(parent, content) for parent, content in zip(parents, contents, strict=True)])
    if not stacked:
        raise BestiaryError("These adapters hold no LoRA weights to merge. Choose LoRA adapters.")
    full = max(down.shape[0] for down, _ in stacked.values())
    if rank is not None and rank >= full:
        raise BestiaryError(f"--rank {rank} is not below {full}, the rank without a loss. Choose a lower one.")
    merged = Merged(_content(stacked, full)) if rank is None else _reduced(stacked, rank)
    provenance = _provenance(parents, contents, merged, exact=rank is None)
    few_step = next((each.few_step for each in contents if each.few_step and each.few_step.timesteps), None)
    return replace(merged, content=replace(merged.content, provenance=provenance, few_step=few_step))


def write_verified(merged: Merged, file: Path, base: str, revision: str | None) -> Verification:
    """Prove that the merged adapter applies to the base, then write it to `file`.

    Raises BestiaryError when another file would be overwritten, and what `verify_adapter` raises. Nothing is written
    then.
    """
    data = merged.content.to_bytes()
    check_not_overwritten(file, data)  # such as the last adapter to merge, if OUT was forgotten
    with tempfile.TemporaryDirectory() as folder:
        unproven = Path(folder, file.name)
        unproven.write_bytes(data)
        try:
            proof = verify_adapter(unproven, base, revision)
        except BestiaryError as error:
            raise BestiaryError(str(error).replace(str(unproven), str(file))) from None
    write_atomically(file, data)
    return proof


def _factors(parent: Parent, content: AdapterContent) -> Factors:
    """A and B of each module in float64, with the parent's weight and scale in B."""
    other = next((change.kind for change in content.changes.values()), None)
    if other or any(config and config.use_dora for _, config in map(content.lora, PARTS)):
        raise BestiaryError(
            f"{parent.name} holds {other or 'DoRA'}. Only plain LoRA adapters can be merged. Leave it out."
        )
    if parent.weight == 0:
        raise BestiaryError(f"{parent.name} has weight 0, so it has no effect. Leave it out.")
    factors = {}
    for part in PARTS:
        weights, config = content.lora(part)
        for key, down in weights.items():
            if config and key.endswith(DOWN):
                module = key.removesuffix(DOWN)
                scale = parent.weight * config.scale_of(module)
                factors[part, module] = down.double(), scale * weights[f"{module}{UP}"].double()
    return factors


def _stack(every: Sequence[Factors]) -> Factors:
    """The factors of all parents side by side: their product is the sum of the parents' products."""
    stacked: dict[Module, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in sorted({module for factors in every for module in factors}):
        found = [factors[module] for factors in every if module in factors]
        if len({(down.shape[1:], up.shape[0]) for down, up in found}) > 1:
            raise BestiaryError(f"The adapters have different shapes in {module[1]}: they are for different bases.")
        stacked[module] = torch.cat([down for down, _ in found]), torch.cat([up for _, up in found], dim=1)
    return stacked


def _content(factors: Factors, rank: int) -> AdapterContent:
    """The factors as an adapter of this rank in float32. Modules with fewer rows are padded with zeros."""
    weights: dict[Part, dict[str, torch.Tensor]] = {part: {} for part in PARTS}
    for (part, module), (down, up) in factors.items():
        missing = rank - down.shape[0]
        padded = torch.cat([up, up.new_zeros(up.shape[0], missing, *up.shape[2:])], dim=1)
        weights[part][f"{module}{DOWN}"] = torch.cat([down, down.new_zeros(missing, *down.shape[1:])]).float()
        weights[part][f"{module}{UP}"] = padded.float()
    unet, text_encoder = (
        AdapterConfig(  # alpha = rank: the scale is in B
            r=rank, lora_alpha=rank, target_modules=sorted(module for of, module in factors if of == part)
        )
        for part in PARTS
    )
    return AdapterContent(
        weights["unet"],
        unet,
        Provenance(),
        text_weights=weights["text_encoder"],
        text_config=text_encoder if weights["text_encoder"] else None,
    )


def _reduced(factors: Factors, rank: int) -> Merged:
    """The closest adapter of this rank, and its error."""
    reduced: dict[Module, tuple[torch.Tensor, torch.Tensor]] = {}
    lost, whole, errors = 0.0, 0.0, {}
    for module, (down, up) in factors.items():
        # QR first: the SVD is then of a matrix of the stacked rank, not of the layer's size.
        left, left_core = torch.linalg.qr(up.flatten(1))  # (out, r)
        right, right_core = torch.linalg.qr(down.flatten(1).T)  # (in, r)
        u, singular, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
        root = singular[:rank].sqrt()
        kept_down = (right @ v[:rank].T * root).T.reshape(-1, *down.shape[1:])
        kept_up = (left @ u[:, :rank] * root).reshape(up.shape[0], -1, *up.shape[2:])
        reduced[module] = kept_down, kept_up
        dropped, total = float(singular[rank:].square().sum()), float(singular.square().sum())
        errors[module] = math.sqrt(dropped / total) if total else 0.0
        lost, whole = lost + dropped, whole + total
    worst = max(errors, key=lambda module: errors[module])
    return Merged(_content(reduced, rank), math.sqrt(lost / whole) if whole else 0.0, errors[worst], worst[1])


def _provenance(
    parents: Sequence[Parent], contents: Sequence[AdapterContent], merged: Merged, *, exact: bool
) -> Provenance:
    """The base that the parents share, and which parents were merged with which weights."""
    known: dict[str, tuple[Parent, Provenance]] = {}
    for parent, content in zip(parents, contents, strict=True):
        if content.provenance.base_sha256:
            known.setdefault(content.provenance.base_sha256, (parent, content.provenance))
    if len(known) > 1:
        names = " and ".join(parent.name for parent, _ in list(known.values())[:2])
        raise BestiaryError(
            f"{names} were trained on different bases, so they cannot be merged. Choose adapters of one base."
        )
    of_base = next((origin for _, origin in known.values()), contents[0].provenance)
    facts: dict[str, object] = {
        "base": of_base.base,
        "base_revision": of_base.base_revision,
        "base_sha256": of_base.base_sha256,
        "resolution": of_base.resolution,
        "merged_from": [
            {"adapter": parent.name, "adapter_sha256": adapter_sha256(parent.file), "weight": parent.weight}
            for parent in parents
        ],
        "merged_by": "concatenation" if exact else "svd",
    }
    if inside := sorted({sha256 for content in contents for sha256 in contained(content)}):
        facts[CONTAINS] = inside
    if not exact:
        facts["relative_error"] = merged.error
    return Provenance.model_validate({key: value for key, value in facts.items() if value is not None})
