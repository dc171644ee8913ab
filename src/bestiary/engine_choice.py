"""Choose the engine that draws: torch with a base and adapters, or OpenVINO with an export that holds both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bestiary.diffusion.export_format import MANIFEST, EngineChoice, Manifest, read_manifest
from bestiary.errors import BestiaryError
from bestiary.registry.resolving import Adapter
from bestiary.samplers import SamplingChanges


@dataclass(frozen=True)
class Wish:
    """What a user asks for that decides which engine can draw it.

    `weighted`: an adapter has a weight of its own. `base` and `device` are chosen ones; empty: not chosen.
    """

    engine: EngineChoice = "auto"
    changes: SamplingChanges = field(default_factory=SamplingChanges)
    has_image: bool = False
    weighted: bool = False
    base: str = ""
    device: str = ""

    def obstacle(self, manifest: Manifest) -> str | None:
        """What the export with this manifest cannot do, as a clause; None when it can draw all of this."""
        if self.has_image:
            return "an export has no encoder, so it cannot start from an image"
        if self.weighted:
            return "the adapter is part of an export's weights, so it cannot have another weight"
        if self.base:
            return "the base is part of an export, so there is no other to choose"
        if self.device not in ("", "cpu"):
            return f"an export draws on the CPU and not on {self.device}"
        if self.changes.decoder not in (None, manifest.decoder):
            return f"the export has the {manifest.decoder} decoder and no other"
        step = manifest.side_step
        if any(side is not None and side % step for side in (self.changes.width, self.changes.height)):
            return f"the export draws pictures whose sides are multiples of {step} pixels"
        return None

    @property
    def changes_steps(self) -> bool:
        """Whether it asks for other steps than those that an export was made for."""
        changes = self.changes
        return any(
            value is not None
            for value in (changes.steps, changes.guidance_scale, changes.guidance_interval, changes.sampler)
        ) or bool(changes.negative_prompt)


def choose_engine(adapters: Sequence[Adapter], wish: Wish) -> tuple[list[Adapter], str | None]:
    """The adapters to draw with, of which one is an export if OpenVINO is to draw; and a note for the user.

    `auto` takes an adapter's accepted export if the export can draw what is asked for and this machine gains from it.
    Raises BestiaryError when the engine that the user chose cannot draw this.
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
    if len(adapters) > 1 or wish.changes_steps:
        return list(adapters), None
    if first.export is None:
        return list(adapters), f"Drawing with torch. {first.no_export}" if first.no_export else None
    from bestiary.diffusion.engines import reason_against

    manifest = read_manifest(first.export)
    reason = wish.obstacle(manifest) or reason_against(manifest)
    if reason:
        return list(adapters), f"Drawing with torch and not with the fast variant: {reason}."
    return [as_export(first, first.export)], None


def as_export(adapter: Adapter, folder: Path) -> Adapter:
    """The adapter as its export draws it."""
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
            f"{export.uri} is an export, which holds its base and adapter, so no other adapter can be applied to it. "
            "Draw with the export alone, or name the adapters' own files."
        )
    if wish.engine == "torch":
        raise BestiaryError(
            f"{export.uri} is an export for OpenVINO, which torch cannot draw with. Leave out --engine, or name the "
            "adapter that it was made of."
        )
    assert export.export is not None
    if reason := wish.obstacle(read_manifest(export.export)):
        raise BestiaryError(f"{export.uri} cannot draw this: {reason}. Leave that out, or name the adapter's own file.")
    return export


def _openvino(adapters: Sequence[Adapter], wish: Wish) -> Adapter:
    if len(adapters) > 1:
        raise BestiaryError(
            "The engine openvino draws with one exported adapter. Merge the adapters and export the result, or draw "
            "with --engine torch."
        )
    (adapter,) = adapters
    if adapter.export is None:
        make = f"`bestiary export {adapter.uri} --to openvino --out DIR`"
        raise BestiaryError(
            adapter.no_export or f"{adapter.uri} has no export. Make one with {make}, then draw with --adapter DIR."
        )
    if reason := wish.obstacle(read_manifest(adapter.export)):
        raise BestiaryError(f"The engine openvino cannot draw this: {reason}. Draw with --engine torch.")
    return as_export(adapter, adapter.export)
