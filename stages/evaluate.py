"""Score the adapter against its base on the same prompts and the same noise."""

import time
from pathlib import Path

from bestiary.stage import CACHE, REPORTS, stage

CLEAN, SPLIT, OTHERS = Path("build/clean"), Path("build/split"), Path("build/others")
ADAPTER = Path("models/adapter")


def main() -> None:
    started = time.perf_counter()
    with stage("evaluate") as (params, run):
        # A mistake in params.yaml is reported before these imports, which take seconds.
        from bestiary.diffusion.adapter import check_trained_on
        from bestiary.diffusion.base import base_sha256, device_and_dtype, load_pipeline, processes
        from bestiary.evaluation.comparison import Compared, evaluate, write
        from bestiary.evaluation.judge import Judge
        from bestiary.evaluation.pictures import PictureCache
        from bestiary.evaluation.report import as_markdown, heading
        from bestiary.evaluation.sweep import write_operating_point

        base = (params.base.model, params.base.revision)
        check_trained_on(ADAPTER, *base)
        processes()  # gives each process its GPU
        device = device_and_dtype()[0].type
        models = [params.judge, *([params.evaluate.second_judge] if params.evaluate.second_judge else [])]
        judges = [Judge.load(model.model, model.revision, device) for model in models]
        # Only one run at a time may use the cache, because each drops the pictures that it does not need.
        cache = PictureCache(run.hold(CACHE / "evaluate"), base_sha256(*base))
        compared = Compared(load_pipeline(*base), ADAPTER, judges, CLEAN, SPLIT, OTHERS)
        resolution = params.encode.resolution  # that the adapter was trained at
        evaluation = evaluate(compared, params.evaluate, seed=params.seed, resolution=resolution, cache=cache)
        if run.is_main:
            write(evaluation, REPORTS / "evaluate")
            chosen = evaluation.chosen
            point = write_operating_point(
                REPORTS / "operating_point",
                chosen.checkpoint,
                chosen.sampling.adapter_weight,
                chosen.sampling.guidance_scale,
            )
            report = evaluation.report(point, stage_seconds=time.perf_counter() - started)
            run.report(report.results(), {"seconds": report.seconds}, headlines=report.headlines)
            table = "\n".join([heading(report), "", *as_markdown(report)])
            run.describe_pipeline(table, "evaluate/sheet.png")
            cache.drop_unused()


if __name__ == "__main__":
    main()
