"""Measures what a picture costs at each setting of the sampler, and how good it is."""

from functools import partial
from pathlib import Path

from bestiary.stage import REPORTS, stage

SPLIT = Path("build/split")

with stage("benchmark") as (params, run):
    import pandas as pd

    from bestiary.diffusion.adapter import check_trained_on
    from bestiary.evaluation import benchmarking, sweep
    from bestiary.subjects import caption, subject_of

    settings, default, base = params.benchmark, params.evaluate, params.base
    resolution = params.encode.resolution  # what the adapter was trained at
    point = sweep.read_operating_point(REPORTS / "operating_point")
    check_trained_on(point.adapter, base.model, base.revision)
    classes = sorted(pd.read_csv(SPLIT / "val.csv", dtype=str)["class"].unique())
    # First, while this process holds little memory and no threads of its own.
    how = default.model_dump(include={"scheduler", "steps", "guidance_interval"})
    how |= {"guidance_scale": point.guidance_scale, "resolution": resolution}
    prompt = caption(subject_of(classes[0]), default.template)
    cold_start = benchmarking.cold_start(base.model, base.revision, point.adapter, prompt, **how)

    import torch

    from bestiary.diffusion.base import device_and_dtype, load_pipeline
    from bestiary.evaluation import plots
    from bestiary.evaluation.judge import Judge

    device, dtype = device_and_dtype()
    judge = Judge.load(params.judge.model, params.judge.revision, device=device.type)
    tiny = settings.tiny_vae
    rows, skipped = benchmarking.run(
        lambda name: load_pipeline(base.model, base.revision, dtype=getattr(torch, name)),
        point.adapter,
        benchmarking.Trial.of(judge, classes, default.template, max(settings.pictures, settings.repeats), params.seed),
        benchmarking.plan(settings, default, str(dtype).removeprefix("torch.")),
        guidance_scale=point.guidance_scale,
        guidance_interval=default.guidance_interval or settings.guidance_interval,
        repeats=settings.repeats,
        quality_batch=default.batch_size,
        resolution=resolution,
        tiny_vae=partial(benchmarking.load_tiny_vae, tiny.model, tiny.revision) if tiny else None,
    )
    for row in rows:  # as the original system's table has it, once more with everything before the first picture
        row["with_loading_s"] = cold_start["import_s"] + cold_start["load_s"] + row["p50_s"]
    plots.quality_against_cost(rows, REPORTS / "benchmark" / "quality_against_cost.png")
    plots.save_table(pd.DataFrame(rows), REPORTS / "benchmark" / "settings.csv")
    run.report(
        {
            "environment": benchmarking.environment(),
            "resolution": resolution,
            "adapter_sha256": point.adapter_sha256,
            "cold_start_s": cold_start.pop("total_s"),
            "cold_start": cold_start,
            "rows": rows,
            "skipped": skipped,
            "fastest_good": benchmarking.fastest_good(rows),
        }
    )
