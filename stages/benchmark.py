"""Measures what a picture costs at each setting of the sampler, and how good it is."""

from pathlib import Path

from pipeline import REPORTS, stage

SPLIT, ADAPTER = Path("build/split"), Path("models/adapter")

with stage("benchmark") as (params, run):
    import pandas as pd

    from bestiary.animals import by_folder, caption
    from bestiary.evaluation import benchmarking

    settings, default = params.benchmark, params.evaluate
    classes = sorted(pd.read_csv(SPLIT / "val.csv", dtype=str)["class"].unique())
    spread = [classes[index * len(classes) // settings.repeats] for index in range(settings.repeats)]
    prompts = [caption(by_folder(name), default.template) for name in spread]
    # First, while this process holds little memory and no threads of its own.
    cold_start = benchmarking.cold_start(
        params.base.model,
        params.base.revision,
        ADAPTER,
        prompts[0],
        **default.model_dump(include={"scheduler", "steps", "guidance_scale"}),
    )

    from bestiary.diffusion.base import load_pipeline
    from bestiary.evaluation import plots
    from bestiary.evaluation.judge import Judge

    pipeline = load_pipeline(params.base.model, params.base.revision)
    rows = benchmarking.run(
        pipeline,
        ADAPTER,
        Judge.load(params.judge.model, params.judge.revision, device=pipeline.device.type),
        benchmarking.grid(
            settings.schedulers,
            settings.steps,
            settings.batch_sizes,
            benchmarking.Setting(default.scheduler, default.steps, batch=1, fused=True),
        ),
        prompts,
        guidance_scale=default.guidance_scale,
        repeats=settings.repeats,
        seed=params.seed,
    )
    plots.quality_against_cost(rows, REPORTS / "benchmark" / "quality_against_cost.png")
    plots.save_table(pd.DataFrame(rows), REPORTS / "benchmark" / "settings.csv")
    run.report(
        {
            "environment": benchmarking.environment(pipeline),
            "cold_start_s": cold_start.pop("total_s"),
            "cold_start": cold_start,
            "rows": rows,
            "fastest_good": benchmarking.fastest_good(rows),
        }
    )
