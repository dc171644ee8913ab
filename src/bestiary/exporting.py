"""From what a user names to an exported folder: find the adapter and its base, choose the precision, export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.diffusion.export_format import Precision
from bestiary.errors import BestiaryError
from bestiary.generation import Base, Weighted, portable_base, weight_of
from bestiary.registry.resolving import Adapter, check_base, find_base, resolve
from bestiary.samplers import Decoder, DrawingDefaults
from bestiary.subjects import ANIMALS, Subject, caption

if TYPE_CHECKING:
    from bestiary.diffusion.export import Exported

CALIBRATION_PICTURES = 8  # whose activations int8 must cover; `make fast` takes export.calibration_pictures


@dataclass(frozen=True)
class ExportRequest:
    """What to export and to which folder. precision None: the fastest that this processor has instructions for.

    `base` replaces the one that the adapter names.
    """

    what: str
    out: Path
    precision: Precision | None = None
    decoder: Decoder = "full"
    base: str | None = None


@dataclass(frozen=True)
class Surroundings:
    """What the project decides: its base, its tiny decoder, and how it draws what does not say."""

    base: Base | None
    tiny_decoder: Base | None
    defaults: DrawingDefaults


def export_adapter(request: ExportRequest, project: Surroundings) -> Exported:
    """Export an adapter, fused into its base, for OpenVINO.

    Raises BestiaryError when there is no adapter, base or tiny decoder, and what `bestiary.diffusion.export` raises.
    """
    named = Weighted.parse(request.what)
    if named.what == "none":
        raise BestiaryError("An export holds an adapter. Name one.")
    if request.decoder == "tiny" and project.tiny_decoder is None:
        raise BestiaryError(
            "There is no tiny decoder. Name one as tiny_decoder in params.yaml, or leave out --decoder."
        )
    adapter = resolve(named.what)
    adapter.check_is_file()
    from bestiary.diffusion import engines, export  # torch, which a refusal does not wait for

    export.check_target(request.out)
    engines.openvino()
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
    """Captions of what the adapter was taught; of some of the 100 animals if it does not say."""
    return spread_captions(adapter.subjects or ANIMALS, defaults.template, CALIBRATION_PICTURES)


def spread_captions(subjects: Sequence[Subject], template: str, count: int) -> list[str]:
    """The captions of `count` subjects, spread evenly over all of them.

    >>> spread_captions(ANIMALS, "a photo of {}", 2)
    ['a photo of an antelope', 'a photo of a lizard']
    """
    return [caption(subjects[number * len(subjects) // count], template) for number in range(count)]
