"""Measures what a picture costs at each setting of the sampler, and how good it is."""

from functools import partial
from pathlib import Path

from pipeline import REPORTS, stage

SPLIT = Path("build/split")

with stage("benchmark") as (params, run):
    import pandas as pd

    from bestiary.animals import by_folder, caption
    from bestiary.diffusion.adapter import check_trained_on
    from bestiary.evaluation import benchmarking, sweep

    settings, default = params.benchmark, params.evaluate
    resolution = params.encode.resolution  # what the adapter was trained at
    point = sweep.read_operating_point(REPORTS / "operating_point")
    check_trained_on(point.adapter, params.base.model, params.base.revision)
    classes = sorted(pd.read_csv(SPLIT / "val.csv", dtype=str)["class"].unique())
    count = max(settings.pictures, settings.repeats)
    labels = [index * len(classes) // count % len(classes) for index in range(count)]
    prompts = [caption(by_folder(classes[label]), default.template) for label in labels]
    # First, while this process holds little memory and no threads of its own.
    how = default.model_dump(include={"scheduler", "steps", "guidance_interval"})
    how |= {"guidance_scale": point.guidance_scale, "resolution": resolution}
    cold_start = benchmarking.cold_start(params.base.model, params.base.revision, point.adapter, prompts[0], **how)

    import torch

    from bestiary.diffusion.base import device_and_dtype, load_pipeline
    from bestiary.evaluation import pictures, plots
    from bestiary.evaluation.judge import Judge

    device, dtype = device_and_dtype()
    judge = Judge.load(params.judge.model, params.judge.revision, device=device.type)
    words = pictures.read_words(judge, classes, default.template)
    seeds = [params.seed + index for index in range(count)]
    usual = benchmarking.Setting(
        default.scheduler,
        default.steps,
        batch=1,
        fused=False,
        guidance="interval" if default.guidance_interval else "always",
        dtype=str(dtype).removeprefix("torch."),
    )
    tiny = settings.tiny_vae
    rows, skipped = benchmarking.run(
        lambda name: load_pipeline(params.base.model, params.base.revision, dtype=getattr(torch, name)),
        point.adapter,
        benchmarking.Trial(prompts, labels, seeds, words, judge),
        benchmarking.grid(
            settings.schedulers,
            settings.steps,
            settings.batch_sizes,
            usual,
            guidance=settings.guidance,
            dtype=settings.dtypes,
            compiled=settings.compile,
            vae=["tiny"] if tiny else [],
        ),
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
