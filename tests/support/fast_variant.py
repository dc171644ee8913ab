"""Fast variants for tests: an export with placeholder files, and the report of the stage accept."""

import json
from collections.abc import Mapping
from pathlib import Path

from bestiary.diffusion.export_format import MANIFEST, Manifest, file_sha256, hash_files
from bestiary.evaluation.acceptance import AcceptanceReport, Differences, Drawn, Way
from bestiary.evaluation.report import Estimate
from bestiary.samplers import DrawingDefaults, Sampling

DRAWING = DrawingDefaults("a photo of {}", Sampling("lcm", steps=2, guidance_scale=1.0, timesteps=(999, 699)))
PASSES: Mapping[Way, int] = {"default": 19, "reference": 200, "few_step": 2, "fast": 2}


def estimate(mean: float, half_width: float = 0.5) -> Estimate:
    """A mean with an interval around it."""
    return Estimate(mean=mean, ci95=(mean - half_width, mean + half_width))


def make_export(folder: Path, few_step_sha256: str, content: str = "a network") -> Path:
    """Write a folder that looks like the export of the few-step adapter with this SHA-256."""
    for name in ("unet/openvino_model.xml", "unet/openvino_model.bin", "vae_decoder/openvino_model.xml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{content} {name}")
    manifest = Manifest(
        format=1,
        engine="openvino",
        precision="int8",
        decoder="tiny",
        base="models/base",
        base_revision=None,
        base_sha256="0" * 64,
        adapter="models/few_step",
        adapter_sha256=few_step_sha256,
        few_step=True,
        drawing=DRAWING.to_dict(),
        side=64,
        processor="a processor",
        versions={},
        files=hash_files(folder),
    )
    (folder / MANIFEST).write_text(json.dumps(manifest.model_dump()))
    return folder


def acceptance(
    adapter_sha256: str, few_step_sha256: str, export: Path | None = None, *, accepted: bool = True
) -> AcceptanceReport:
    """The report of the stage accept about an export."""
    scores = {key: estimate(90.0) for key in ("clip_score", "margin", "top1", "cmmd", "diversity")}
    row = {key: estimate(0.25) for key in scores}
    drawn = {
        way: Drawn(sampler="lcm", steps=2, passes=passes, pictures=512, scores=scores, copied=estimate(0.0, 0.1))
        for way, passes in PASSES.items()
    }
    return AcceptanceReport(
        adapter_sha256=adapter_sha256,
        few_step_sha256=few_step_sha256,
        export_sha256=file_sha256(export / MANIFEST) if export else "0" * 64,
        engine="openvino",
        precision="int8",
        decoder="tiny",
        ways=drawn,
        real={"cmmd": estimate(0.0)},
        real_pictures=160,
        differences=Differences(fast_default=row, fast_reference=row, distillation=row, export=row),
        diversity_ratio=estimate(1.0, 0.1),
        accepted=accepted,
        reasons=("It loses little.",) if accepted else ("It may lose too much: CLIP score -9.00.",),
    )
