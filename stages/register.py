"""Verify the adapter, register it once, and let the gate decide whether it becomes the champion."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from bestiary.diffusion.base import base_sha256
from bestiary.evaluation.sweep import read_operating_point
from bestiary.registry import register
from bestiary.settings import Usual
from bestiary.tracking import content_hash
from pipeline import REPORTS, stage

with stage("register") as (params, run):
    evaluate, base, judge = params.evaluate, params.base, params.judge
    point = read_operating_point(REPORTS / "operating_point")
    reports = {name: json.loads((REPORTS / f"{name}.json").read_text()) for name in ("train", "evaluate", "benchmark")}
    if point.adapter.as_posix() != "models/adapter":  # a sweep chose another file than training's best
        del reports["train"]
    # Two adapters compare only when they were measured alike: base, judge, prompts, seeds, sampler, animals.
    how = [
        base_sha256(base.model, base.revision),
        content_hash(Path(judge.model)) if Path(judge.model).is_dir() else judge.model_dump(),
        evaluate.model_dump(exclude={"batch_size", "bootstrap_resamples", "second_judge", "sweep", "guidance_scale"}),
        point.guidance_scale,
        sorted(reports["evaluate"]["per_class"]),
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
