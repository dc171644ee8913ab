"""Choose the engine that draws: torch with a base and adapters, or OpenVINO with an export that contains both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bestiary.diffusion.export_format import (
    MANIFEST,
    DamagedExportError,
    EngineChoice,
    Manifest,
    UnusableExportError,
    read_manifest,
)
from bestiary.errors import BestiaryError
from bestiary.registry.resolving import Adapter, how_to_restore_fast_variant
from bestiary.samplers import SamplingChanges


@dataclass(frozen=True)
class Wish:
    """The parts of a user's request that decide which engine can draw it.

    `weighted`: the user gave an adapter a weight. `base` and `device` are empty if the user did not choose them.
    `has_grid`: the request is a grid, which compares several values.
    """

    engine: EngineChoice = "auto"
    changes: SamplingChanges = field(default_factory=SamplingChanges)
    has_image: bool = False
    weighted: bool = False
    base: str = ""
    device: str = ""
    has_grid: bool = False

    @property
    def obstacle_to_any(self) -> str | None:
        """Why no export can draw this, as a clause; None if one may."""
        if self.has_image:
            return "an export has no encoder, so it cannot start from an image"
        if self.weighted:
            return "the adapter is fused into an export, so it cannot have another weight"
        if self.base:
            return "the base is part of an export, so it cannot be changed"
        if self.device not in ("", "cpu"):
            return f"an export draws on the CPU, not on {self.device}"
        return None

    def obstacle(self, manifest: Manifest) -> str | None:
        """Why the export with this manifest cannot draw this, as a clause; None if it can."""
        if self.obstacle_to_any:
            return self.obstacle_to_any
        if self.changes.decoder not in (None, manifest.decoder):
            return f"the export has only the {manifest.decoder} decoder"
        step = manifest.side_step
        if any(side is not None and side % step for side in (self.changes.width, self.changes.height)):
            return f"the sides of its pictures are multiples of {step} pixels"
        return None

    def reason_against(self, manifest: Manifest) -> str | None:
        """Why not to draw this with an export that is not on this machine yet, as a clause.

        None if the export is worth its download: this machine can draw this with it and, for `auto`, faster.
        """
        from bestiary.diffusion import engines

        of_machine = engines.reason_against if self.engine == "auto" else engines.obstacle_here
        return self.obstacle(manifest) or of_machine(manifest)

    @property
    def changes_steps(self) -> bool:
        """Whether the user chose a sampler, steps, guidance or a negative prompt. An export is made for its own."""
        changes = self.changes
        return any(
            value is not None
            for value in (changes.steps, changes.guidance_scale, changes.guidance_interval, changes.sampler)
        ) or bool(changes.negative_prompt)

    def obstacle_for_auto(self, adapters: int) -> str | None:
        """Why `auto` draws this number of adapters with torch whatever the export contains, as a clause.

        None if the export decides.
        """
        if adapters > 1:
            return "it holds only one adapter, and several were chosen"
        if self.changes_steps:
            return "its sampler, steps and guidance are fixed, and it takes no negative prompt"
        if self.has_grid:
            return "a grid may vary settings that are fixed in it"
        return self.obstacle_to_any

    def needs_export(self, adapters: int) -> bool:
        """Whether the choice of an engine for this number of adapters depends on a registered version's export.

        A server's export is downloaded only if it does.
        """
        if self.engine == "openvino":
            return adapters == 1 and not self.obstacle_to_any
        return self.engine == "auto" and not self.obstacle_for_auto(adapters)


def _leave_closed(_: Adapter) -> None:
    """Open nothing."""


def choose_engine(
    adapters: Sequence[Adapter], wish: Wish, open_export: Callable[[Adapter], None] = _leave_closed
) -> tuple[list[Adapter], str | None]:
    """The adapters to draw with, and a note for the user. If OpenVINO draws, the only adapter is an export.

    `auto` takes an adapter's accepted export if it can draw what the user asks for and is faster on this machine. If
    torch draws instead, the note gives the reason. `auto` opens the export with `open_export`, and falls back to torch
    if that raises UnusableExportError.
    Raises BestiaryError when the chosen engine cannot draw this.
    """
    exports = [adapter for adapter in adapters if adapter.is_export]
    if exports:
        return [_chosen_export(exports[0], adapters, wish)], None
    if wish.engine == "torch" or not adapters:
        if wish.engine == "openvino":
            raise BestiaryError("The engine openvino draws with an exported adapter. Name one with --adapter.")
        return list(adapters), None
    first = adapters[0]
    if wish.engine == "openvino":
        return [_openvino(adapters, wish)], None
    if not any(adapter.has_fast_variant for adapter in adapters):
        return list(adapters), None
    reason = wish.obstacle_for_auto(len(adapters))
    if not reason and first.no_export:
        return list(adapters), f"Drawing with torch. {first.no_export}"
    reason = reason or first.not_downloaded or _reason_for_torch(first.export, wish)
    if first.export is None or reason:
        return list(adapters), f"Drawing with torch instead of the fast variant: {reason}." if reason else None
    export = as_export(first, first.export)
    try:
        open_export(export)
    except UnusableExportError as error:
        return list(adapters), why_torch_draws(first, error)
    return [export], None


def why_torch_draws(adapter: Adapter, error: UnusableExportError) -> str:
    """The note that torch draws with an adapter because its fast variant cannot be used."""
    note = f"Drawing with torch instead of the fast variant. {error.problem}"
    if adapter.export and isinstance(error, DamagedExportError):
        note += f" {how_to_restore_fast_variant(adapter.export)}"
    return note


def _reason_for_torch(export: Path | None, wish: Wish) -> str | None:
    """Why torch draws instead of an export, as a clause; None if the export does. Without an export: of any."""
    from bestiary.diffusion.engines import reason_against

    manifest = read_manifest(export) if export else None
    return (manifest and wish.obstacle(manifest)) or reason_against(manifest)


def as_export(adapter: Adapter, folder: Path) -> Adapter:
    """The adapter as it is drawn from the export in `folder`, with the base and the defaults that the export names."""
    manifest = read_manifest(folder)
    return replace(
        adapter,
        file=folder / MANIFEST,
        base=manifest.base,
        base_revision=manifest.base_revision,
        base_sha256=manifest.base_sha256,
        defaults=manifest.defaults,
        few_step=manifest.few_step,
        export=folder,
    )


def _chosen_export(export: Adapter, adapters: Sequence[Adapter], wish: Wish) -> Adapter:
    if len(adapters) > 1:
        raise BestiaryError(
            f"{export.uri} is an export with its base and adapter fused, so no other adapter can be applied to it. "
            "Draw with the export alone, or name the adapter files instead."
        )
    if wish.engine == "torch":
        raise BestiaryError(
            f"{export.uri} is an export for OpenVINO, which torch cannot draw with. Leave out --engine, or name the "
            "adapter that it was exported from."
        )
    assert export.export is not None
    if reason := wish.obstacle(read_manifest(export.export)):
        raise BestiaryError(f"{export.uri} cannot draw this: {reason}. Leave that out, or name the adapter file.")
    return export


def _openvino(adapters: Sequence[Adapter], wish: Wish) -> Adapter:
    if len(adapters) > 1:
        raise BestiaryError(
            "The engine openvino draws with only one exported adapter. Merge the adapters and export the result, or "
            "draw with --engine torch."
        )
    (adapter,) = adapters
    of_export = wish.obstacle(read_manifest(adapter.export)) if adapter.export else wish.obstacle_to_any
    if reason := of_export or adapter.not_downloaded:
        raise BestiaryError(f"The engine openvino cannot draw this: {reason}. Use --engine torch.")
    if adapter.export is None:
        make = f"`bestiary export {adapter.uri} --to openvino --out DIR`"
        raise BestiaryError(
            adapter.no_export or f"{adapter.uri} has no export. Make one with {make}, then draw with --adapter DIR."
        )
    return as_export(adapter, adapter.export)
