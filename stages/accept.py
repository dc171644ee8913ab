"""Measure what the fast variant costs against the default way and DDPM, and accept or refuse it."""

from dataclasses import replace
from pathlib import Path

from bestiary.stage import CACHE, REPORTS, stage

CLEAN, SPLIT, OTHERS = Path("build/clean"), Path("build/split"), Path("build/others")
FEW_STEP, FAST = Path("models/few_step"), Path("models/fast")


def main() -> None:
    with stage("accept") as (params, run):
        # A mistake in params.yaml is reported before these imports, which take seconds.
        from bestiary.diffusion.base import base_sha256, device_and_dtype, load_pipeline, processes
        from bestiary.evaluation.fast_variant import DefaultWay, Trial, accept, read_fast_variant, write
        from bestiary.evaluation.judge import Judge
        from bestiary.evaluation.likeness import read_likeness
        from bestiary.evaluation.pictures import PictureCache
        from bestiary.evaluation.sweep import read_operating_point

        evaluate, base = params.evaluate, (params.base.model, params.base.revision)
        resolution = params.encode.resolution  # of the adapter's training
        point = read_operating_point(REPORTS / "operating_point")
        fast = read_fast_variant(FEW_STEP, FAST, adapter_sha256=point.adapter_sha256, side=resolution)
        processes()  # gives each process its GPU
        # Evaluate has drawn most pictures of the default way. It drops others from its cache, so accept has its own.
        of_evaluate, own = (PictureCache(run.hold(CACHE / name), base_sha256(*base)) for name in ("evaluate", "accept"))
        sampling = replace(evaluate.sampling(resolution), guidance_scale=point.guidance_scale)
        trial = Trial(
            load_pipeline(*base),
            Judge.load(params.judge.model, params.judge.revision, device_and_dtype()[0].type),
            CLEAN,
            SPLIT,
            resamples=evaluate.bootstrap_resamples,
            seed=params.seed,
            batch_size=evaluate.batch_size,
            template=evaluate.template,
            classes=evaluate.classes,
        )
        if evaluate.proof:
            trial = replace(trial, likeness=read_likeness(trial, OTHERS, evaluate.proof, sampling, own))
        default = DefaultWay(point.adapter, sampling, evaluate.seeds, of_evaluate)
        acceptance = accept(trial, default, fast, params.accept, own)
        if run.is_main:
            write(acceptance, REPORTS / "accept")
            own.drop_unused()
            report = acceptance.report
            run.report(report.results(), {"seconds": report.seconds}, headlines=report.headlines)


if __name__ == "__main__":
    main()
