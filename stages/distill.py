"""Distil the base and the adapter that evaluate chose into the few-step adapter models/few_step."""

from dataclasses import replace
from pathlib import Path

from bestiary.diffusion.adapter import adapter_sha256, apply_adapter, save_adapter, verify_adapter
from bestiary.diffusion.adapter_format import FILE_NAME
from bestiary.diffusion.base import device_and_dtype, load_pipeline, load_scheduler
from bestiary.diffusion.distillation import distill
from bestiary.diffusion.few_step_adapter import combine, find_few_step, make_teacher, sampling_of
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.provenance import checkpoint_key, distillation_provenance
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.sweep import read_operating_point
from bestiary.evaluation.watching import SheetPlan, TrainingWatch
from bestiary.files import discard, write_atomically
from bestiary.stage import CACHE, REPORTS, content_of, stage

LATENTS, FEW_STEP, REPORT = Path("build/latents"), Path("models/few_step"), "distill"


def main() -> None:
    with stage("distill") as (params, run):
        base, settings, seed, resolution = params.base, params.distill, params.seed, params.encode.resolution
        latents = Latents.open(LATENTS)
        # accept and register use the checkpoint and weight that a sweep chose, so distillation starts from them, too.
        adapter = read_operating_point(REPORTS / "operating_point").adapter
        chosen = settings.from_
        difference = find_few_step(chosen) if chosen else None
        sources = adapter_sha256(adapter), adapter_sha256(difference) if difference else None
        provenance = distillation_provenance(base, latents, settings, sources, seed=seed, resolution=resolution)
        sampling = sampling_of(chosen, difference) if chosen and difference else settings.sampling()
        pipeline = load_pipeline(base.model, base.revision)
        make_teacher(pipeline, adapter, base)
        # Not in models/few_step, because DVC empties that folder before each run.
        unfinished = run.hold(CACHE / "distill" / checkpoint_key(provenance, settings, content_of(params.judge)))
        subjects = [latents.subjects.of(name) for name in sorted(set(latents.training.images["class"]))]
        watch = TrainingWatch(
            pipeline,
            Judge.load(params.judge.model, params.judge.revision, device_and_dtype()[0].type),
            SheetPlan(subjects, settings, replace(sampling, width=resolution, height=resolution), seed),
            folder=unfinished / "sheet",
            first="few-step" if chosen else "before",
        )

        def on_validation(step: int) -> float:
            score = watch.draw(step)
            for number, row in watch.save_sheet(REPORTS / REPORT / "sheet.png").items():
                run.log_image(row, "sheet", number)
            return score

        results: dict[str, object] = {}
        costs: dict[str, float] = {}
        if difference:
            apply_adapter(pipeline, difference, chosen.weight if chosen else 1.0)
            results["clip_score"] = on_validation(0)
        else:
            result = distill(
                pipeline.unet,
                load_scheduler(base.model, base.revision),
                latents,
                settings,
                seed=seed,
                on_log=lambda step, numbers: run.log_metrics(numbers, step),
                on_validation=on_validation,
                checkpoints=unfinished,
            )
            result.write(REPORTS / REPORT)
            results, costs = {**result.results()}, result.costs()
            difference = save_adapter(pipeline.unet, unfinished / "difference", provenance)
        content = combine(adapter, difference, chosen.weight if chosen else 1.0, sampling, provenance)
        write_atomically(FEW_STEP / FILE_NAME, content.to_bytes())
        verified = verify_adapter(FEW_STEP, base.model, base.revision)
        run.report({**results, "adapter_sha256": verified.sha256}, costs, headlines=("clip_score",))
        discard(unfinished)


if __name__ == "__main__":
    main()
