"""Scores the adapter against its base, on the same prompts and the same noise, by the judge."""

import time
from pathlib import Path

from bestiary.stage import CACHE, REPORTS, stage

CLEAN, SPLIT, ADAPTER = Path("build/clean"), Path("build/split"), Path("models/adapter")
OPERATING_POINT = REPORTS / "operating_point"

started = time.perf_counter()
with stage("evaluate") as (params, run):
    from bestiary.diffusion.adapter import check_trained_on
    from bestiary.diffusion.base import base_sha256, device_and_dtype, load_pipeline, processes
    from bestiary.evaluation import comparison, sweep
    from bestiary.evaluation.judge import Judge
    from bestiary.evaluation.pictures import Kept

    check_trained_on(ADAPTER, params.base.model, params.base.revision)
    processes()  # gives each process its GPU
    models = [params.judge, *([params.evaluate.second_judge] if params.evaluate.second_judge else [])]
    judges = [Judge.load(model.model, model.revision, device=device_and_dtype()[0].type) for model in models]
    # Pictures as they are drawn, for the run after one that was stopped; an evaluation beside it would drop them.
    kept = Kept(run.hold(CACHE / "evaluate"), {"base_sha256": base_sha256(params.base.model, params.base.revision)})
    found = comparison.evaluate(
        load_pipeline(params.base.model, params.base.revision),
        ADAPTER,
        judges,
        CLEAN,
        SPLIT,
        params.evaluate,
        seed=params.seed,
        resolution=params.encode.resolution,  # what the adapter was trained at
        kept=kept,
    )
    if run.is_main:
        comparison.write(found, REPORTS / "evaluate")
        point = sweep.settle(OPERATING_POINT, found.checkpoint, found.scale, found.guidance_scale)
        seconds = found.report["seconds"] | {"stage_s": time.perf_counter() - started}  # start-up and figures included
        run.report(found.report | {"adapter_sha256": point.adapter_sha256, "seconds": seconds})
        kept.drop_unused()
