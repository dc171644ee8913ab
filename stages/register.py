"""Verify the adapter, register it once and let the gate decide whether it becomes the champion."""

from dataclasses import asdict, replace

from bestiary.diffusion.base import base_sha256
from bestiary.evaluation.report import read_evaluation
from bestiary.evaluation.sweep import read_operating_point
from bestiary.registry.gate import measurement_hash
from bestiary.registry.registering import Submission, register
from bestiary.registry.result_page.page import write_page
from bestiary.samplers import DrawingDefaults
from bestiary.stage import REPORTS, RESULTS, content_of, read_report, stage


def main() -> None:
    with stage("register") as (params, run):
        base, resolution = params.base, params.encode.resolution
        point = read_operating_point(REPORTS / "operating_point")
        evaluation = read_evaluation(RESULTS / "evaluate.json")
        is_trained_one = point.adapter.as_posix() == "models/adapter"  # a sweep may choose another checkpoint
        stages = ("train", "benchmark") if is_trained_one else ("benchmark",)
        submission = Submission(
            adapter=point.adapter,
            base=base.model,
            base_revision=base.revision,
            evaluation=evaluation,
            reported={name: read_report(name).get("adapter_sha256") for name in stages},
            pictures=REPORTS / "evaluate" / "pictures.csv",
            defaults=DrawingDefaults(
                params.evaluate.template,
                replace(params.evaluate.sampling(resolution), guidance_scale=point.guidance_scale),
            ),
            measured=measurement_hash(
                evaluation,
                params.evaluate,
                base_sha256=base_sha256(base.model, base.revision),
                judge=content_of(params.judge),
                resolution=resolution,
                seed=params.seed,
            ),
            run_id=run.id,
        )
        registration = register(submission, params.register_)
        write_page(REPORTS / "index.html", submission, registration)
        run.report(asdict(registration), headlines=("version", "decision"))


if __name__ == "__main__":
    main()
