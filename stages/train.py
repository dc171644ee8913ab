"""Train an adapter on build/latents and draw the same prompts and seeds at each validation."""

from dataclasses import replace
from pathlib import Path

from bestiary.diffusion.adapter import save_adapter, verify_adapter
from bestiary.diffusion.base import device_and_dtype, load_pipeline, load_scheduler, processes
from bestiary.diffusion.checkpoints import keep_adapter, publish_kept_adapters
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.preservation import class_word_of, preserve
from bestiary.diffusion.provenance import checkpoint_key, training_provenance
from bestiary.diffusion.training import train
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.watching import SheetPlan, TrainingWatch
from bestiary.files import discard
from bestiary.stage import CACHE, REPORTS, content_of, stage

LATENTS, ADAPTER, REPORT = Path("build/latents"), Path("models/adapter"), REPORTS / "train"


def main() -> None:
    with stage("train") as (params, run):
        base, settings, seed, resolution = params.base, params.train, params.seed, params.encode.resolution
        processes()  # gives each process its GPU
        latents = Latents.open(LATENTS)
        provenance = training_provenance(base, latents, settings, seed=seed, resolution=resolution)
        pipeline = load_pipeline(base.model, base.revision)
        # Not in models/adapter, which DVC empties before each run.
        unfinished = run.hold(CACHE / "train" / checkpoint_key(provenance, settings, content_of(params.judge)))
        scheduler = load_scheduler(base.model, base.revision)
        subjects = [latents.subjects.of(name) for name in sorted(set(latents.training.images["class"]))]
        if settings.preservation.kind != "none":
            preserved = preserve(
                pipeline,
                scheduler,
                latents.training,
                settings,
                settings.sheet_sampling(resolution),
                class_words=[class_word_of(subject) for subject in subjects],
                seed=seed,
                file=unfinished / "preserved.safetensors",
            )
            latents = replace(latents, preserved=preserved)
        if run.is_main:
            # The judge sees a few pictures per validation, which a CPU can do while a small GPU keeps its memory.
            device = "cpu" if settings.low_memory else device_and_dtype()[0].type
            judge = Judge.load(params.judge.model, params.judge.revision, device)
            at_once = 1 if settings.low_memory else None
            plan = SheetPlan(subjects, settings, settings.sheet_sampling(resolution), seed, at_once)
            watch = TrainingWatch(pipeline, judge, plan, folder=unfinished / "sheet")

        def on_validation(step: int) -> float:
            score = watch.draw(step)
            for number, row in watch.save_sheet(REPORT / "sheet.png").items():
                run.log_image(row, "sheet", number)  # MLflow shows the rows of several runs side by side, step by step
            if step and settings.keep_checkpoints:
                keep_adapter(unfinished, step, pipeline.unet, provenance)
            return score

        result = train(
            pipeline.unet,
            scheduler,
            latents,
            settings,
            seed=seed,
            on_log=lambda step, numbers: run.log_metrics(numbers, step),
            on_validation=on_validation,
            checkpoints=unfinished,
        )
        if run.is_main:
            verification = verify_adapter(save_adapter(pipeline.unet, ADAPTER, provenance), base.model, base.revision)
            publish_kept_adapters(unfinished, ADAPTER / "checkpoints")
            result.write(REPORT)
            run.report(
                {**result.results(), "adapter_sha256": verification.sha256},
                result.costs(),
                headlines=("best_step", "val_loss", "clip_score", "trainable_parameters"),
            )
            discard(unfinished)


if __name__ == "__main__":
    main()
