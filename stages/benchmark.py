"""Measure what a picture costs with each setting, and how good it is."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from bestiary.stage import REPORTS, stage

SPLIT, FIGURES = Path("build/split"), REPORTS / "benchmark"


def main() -> None:
    with stage("benchmark") as (params, run):
        # A mistake in params.yaml is reported before these imports, which take seconds.
        import pandas as pd
        import torch

        from bestiary.diffusion.adapter import check_trained_on
        from bestiary.diffusion.base import device_and_dtype, load_pipeline
        from bestiary.diffusion.decoders import find_tiny_decoder, load_tiny_decoder
        from bestiary.evaluation import benchmark, plots
        from bestiary.evaluation.cold_start import cold_start
        from bestiary.evaluation.judge import Judge
        from bestiary.evaluation.sweep import read_operating_point
        from bestiary.subjects import Subjects, caption
        from bestiary.tables import read_table

        settings, evaluate, base = params.benchmark, params.evaluate, (params.base.model, params.base.revision)
        point = read_operating_point(REPORTS / "operating_point")
        check_trained_on(point.adapter, *base)
        resolution = params.encode.resolution  # that the adapter was trained at
        sampling = replace(evaluate.sampling(resolution), guidance_scale=point.guidance_scale)
        classes = sorted(read_table(SPLIT / "val.csv")["class"].unique())
        # The cold start comes first, while this process holds little memory and computes nothing.
        subjects = Subjects.read_from(SPLIT)
        prompt = caption(subjects.of(classes[0]), evaluate.template)
        start = cold_start(*base, point.adapter, prompt, sampling)

        device, dtype = device_and_dtype()
        judge = Judge.load(params.judge.model, params.judge.revision, device.type)
        tiny = params.tiny_decoder
        if tiny:  # download it first, so that a failure does not lose measurements
            find_tiny_decoder(tiny.model, tiny.revision)
        bench = benchmark.Bench(
            load=lambda name: load_pipeline(*base, dtype=getattr(torch, name)),
            adapter=point.adapter,
            trial=benchmark.Trial.of(
                judge, classes, evaluate.template, max(settings.pictures, settings.repeats), params.seed, subjects
            ),
            sampling=replace(sampling, guidance_interval=sampling.guidance_interval or settings.guidance_interval),
            repeats=settings.repeats,
            untimed_batch=evaluate.batch_size,
            load_tiny_decoder=partial(load_tiny_decoder, tiny.model, tiny.revision) if tiny else None,
        )
        default = benchmark.default_setting(evaluate, str(dtype).removeprefix("torch."))
        rows, skipped = benchmark.run(bench, benchmark.plan(settings, default, tiny_decoder=tiny is not None))
        loading_s = start.parts.import_s + start.parts.load_s
        rows = [replace(row, with_loading_s=loading_s + row.cost.p50_s) for row in rows]
        plots.quality_against_cost(rows, FIGURES / "quality_against_cost.png")
        plots.save_table(pd.DataFrame([row.to_dict() for row in rows]), FIGURES / "settings.csv")
        run.log_artifact(FIGURES, FIGURES.name)
        report = benchmark.BenchmarkReport(resolution, point.adapter_sha256, start, rows, skipped)
        run.report(report.results(), report.costs())


if __name__ == "__main__":
    main()
