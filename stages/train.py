"""Train stage: an adapter on the cached latents, with a sheet of the same prompts and seeds at each validation."""

import shutil
from dataclasses import asdict
from pathlib import Path

from bestiary.diffusion.adapter import FILE_NAME, save_adapter, verify_adapter
from bestiary.diffusion.base import base_commit, base_sha256, device_and_dtype, load_pipeline, load_scheduler, processes
from bestiary.diffusion.checkpoints import checkpoint_key
from bestiary.diffusion.latents import LatentCache
from bestiary.diffusion.training import TrainingSettings, train
from bestiary.errors import BestiaryError
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.watching import Watch
from bestiary.files import write_atomically
from bestiary.stage import CACHE, content_of, stage

LATENTS, ADAPTER, REPORT = Path("build/latents"), Path("models/adapter"), Path("reports/train")
STAGE_ONLY = {"sheet_animals", "sheet_seeds", "sheet_steps", "sheet_guidance_scale", "keep_checkpoints"}

with stage("train") as (params, run):
    training, validation = LatentCache.open(LATENTS, "train"), LatentCache.open(LATENTS, "val")
    base = (params.base.model, params.base.revision)
    processes()  # gives each process its GPU
    pipeline = load_pipeline(*base)
    settings = TrainingSettings(seed=params.seed, **params.train.model_dump(exclude=STAGE_ONLY))
    commit = base_commit(*base)
    made_from = {
        "base": params.base.model,
        **({"base_revision": commit} if commit else {}),
        "base_sha256": base_sha256(*base),
        "data_sha256": training.data_sha256,
        "resolution": params.encode.resolution,
        "params": {name: value for name, value in asdict(settings).items() if name != "checkpoint_seconds"},
    }
    if made_from["base_sha256"] != training.base_sha256:
        raise BestiaryError(f"The latents were made with another base than {base[0]}: run the encode stage again.")
    # DVC empties models/adapter before each run. The sheet and its judge may decide which step is the best.
    drawn = {"sheet": params.train.model_dump(include=STAGE_ONLY), "judge": content_of(params.judge)}
    checkpoints = run.hold(CACHE / "train" / checkpoint_key(made_from | drawn))
    if run.is_main:
        judge = Judge.load(params.judge.model, params.judge.revision, device_and_dtype()[0].type)
        classes = sorted(set(training.images["class"]))
        kept, resolution = checkpoints / "sheet", params.encode.resolution
        watch = Watch(pipeline, judge, classes, params.train, seed=params.seed, resolution=resolution, kept=kept)

    def show(step: int) -> float:
        score = watch.draw(step)
        for number, row in watch.save(REPORT / "sheet.png").items():  # MLflow puts the runs' rows of a step together
            run.log_image(row, "sheet", number)
        if step and params.train.keep_checkpoints:
            save_adapter(pipeline.unet, checkpoints / "kept" / f"step-{step:06}", made_from)
        return score

    result = train(
        pipeline.unet,
        load_scheduler(*base),
        training,
        validation,
        settings,
        on_log=lambda step, numbers: run.log_metrics(numbers, step),
        on_validation=show,
        checkpoints=checkpoints,
    )
    if run.is_main:
        proof = verify_adapter(save_adapter(pipeline.unet, ADAPTER, made_from), *base)
        shutil.rmtree(ADAPTER / "checkpoints", ignore_errors=True)
        for file in (checkpoints / "kept").glob(f"*/{FILE_NAME}"):  # and nothing that a kill has left half-written
            write_atomically(ADAPTER / "checkpoints" / file.parent.name / FILE_NAME, file.read_bytes())
        result.write(REPORT)
        run.report(result.report() | {"adapter_sha256": proof.sha256})
        done = checkpoints.with_suffix(".done")  # or a kill halfway would leave some for the next training
        shutil.rmtree(done, ignore_errors=True)
        shutil.rmtree(checkpoints.rename(done), ignore_errors=True)
