"""Export the adapter that a user names: find it and its base, choose the precision, write the folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.diffusion.export_format import Precision
from bestiary.errors import BestiaryError
from bestiary.files import check_writable
from bestiary.generation import Base, Weighted, portable_base, weight_of
from bestiary.registry.resolving import Adapter, check_base, find_base, resolve
from bestiary.samplers import Decoder, DrawingDefaults
from bestiary.subjects import ANIMALS, Subject, caption

if TYPE_CHECKING:
    from bestiary.diffusion.export import Exported

CALIBRATION_PICTURES = 8  # to measure activations for int8; `make fast` uses export.calibration_pictures


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and to which folder. A precision of None is the fastest that this processor supports.

    `base` overrides the base that the adapter names.
    """

    what: str
    out: Path
    precision: Precision | None = None
    decoder: Decoder = "full"
    base: str | None = None


@dataclass(frozen=True)
class Surroundings:
    """The project's settings: its base, its tiny decoder, and how to draw with an adapter that has no settings."""

    base: Base | None
    tiny_decoder: Base | None
    defaults: DrawingDefaults


def export_adapter(request: ExportRequest, project: Surroundings) -> Exported:
    """Export an adapter, fused into its base, for OpenVINO.

    Raises BestiaryError when there is no adapter, base or tiny decoder, or when `bestiary.diffusion.export` fails.
    """
    named = Weighted.parse(request.what)
    if named.what == "none":
        raise BestiaryError("An export needs an adapter, and 'none' is not one. Name an adapter.")
    if request.decoder == "tiny" and project.tiny_decoder is None:
        raise BestiaryError("There is no tiny decoder. Set tiny_decoder in params.yaml, or leave out --decoder.")
    check_writable(request.out.absolute().parent)
    adapter = resolve(named.what)
    adapter.check_is_file()
    from bestiary.diffusion import engines, export  # imports torch, so do the cheap checks first

    export.check_target(request.out)
    engines.openvino_core()
    model = find_base(adapter, request.base, [project.base.model] if project.base else [])
    revision = None if request.base else adapter.base_revision
    if request.base is None and adapter.base_sha256:
        from bestiary.diffusion.base import base_sha256

        check_base(adapter, model, base_sha256(model, revision))
    weight = weight_of(adapter, named)
    if weight == 0:
        raise BestiaryError("With the weight 0, an export would hold no adapter. Choose a weight above 0.")
    defaults = adapter.defaults or project.defaults
    fused = export.Fused(
        base=model,
        base_revision=revision,
        base_name=portable_base(model),
        adapter=adapter.file,
        adapter_name=adapter.uri,
        weight=weight,
        defaults=defaults,
        few_step=adapter.few_step,
    )
    tiny = project.tiny_decoder if request.decoder == "tiny" else None
    form = export.Format(
        request.precision or engines.Processor.here().best(),
        export.TinyDecoder(tiny.model, tiny.revision) if tiny else None,
    )
    return export.export(fused, form, export.Calibration(calibration_prompts(adapter, defaults)), request.out)


def calibration_prompts(adapter: Adapter, defaults: DrawingDefaults) -> list[str]:
    """Captions of the adapter's subjects, or of some of the 100 animals if it names none."""
    return spread_captions(adapter.subjects or ANIMALS, defaults.template, CALIBRATION_PICTURES)


def spread_captions(subjects: Sequence[Subject], template: str, count: int) -> list[str]:
    """Captions of `count` subjects, spread evenly over all of them.

    >>> spread_captions(ANIMALS, "a photo of {}", 2)
    ['a photo of an antelope', 'a photo of a leopard']
    """
    return [caption(subjects[number * len(subjects) // count], template) for number in range(count)]
