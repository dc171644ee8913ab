"""Verify the adapter, register it once, and let the gate decide whether it becomes the champion."""

import hashlib
import json
from dataclasses import asdict, replace

from bestiary.diffusion.base import base_sha256
from bestiary.evaluation.sweep import read_operating_point
from bestiary.registry import register
from bestiary.settings import Usual
from bestiary.stage import REPORTS, content_of, read_report, stage

with stage("register") as (params, run):
    evaluate, base = params.evaluate, params.base
    point = read_operating_point(REPORTS / "operating_point")
    reports = {name: read_report(name) for name in ("train", "evaluate", "benchmark")}
    if point.adapter.as_posix() != "models/adapter":  # a sweep chose another file than training's best
        del reports["train"]
    # Two adapters compare only when they were measured alike: base, judge, prompts, seeds, noise, sampler, animals.
    how = [
        base_sha256(base.model, base.revision),
        content_of(params.judge),
        evaluate.model_dump(exclude={"batch_size", "bootstrap_resamples", "second_judge", "sweep", "guidance_scale"}),
        point.guidance_scale,
        sorted(reports["evaluate"]["per_class"]),
        reports["evaluate"]["classes"],
        params.encode.resolution,
        params.seed,
    ]
    registration = register(
        point.adapter,
        reports,
        REPORTS / "evaluate" / "pictures.csv",
        params.register_,
        base=base.model,
        base_revision=base.revision,
        run_id=run.id,
        measured=hashlib.sha256(json.dumps(how).encode()).hexdigest(),
        usual=replace(Usual.of(evaluate), guidance_scale=point.guidance_scale, resolution=params.encode.resolution),
    )
    run.report(asdict(registration))
