"""Train stage: an adapter on the cached latents, with a sheet of the same prompts and seeds at each validation."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from bestiary.animals import CAPTION_TEMPLATES, by_folder, caption
from bestiary.diffusion.adapter import save_adapter, verify_adapter
from bestiary.diffusion.base import base_commit, base_sha256, device_and_dtype, load_pipeline, load_scheduler, processes
from bestiary.diffusion.checkpoints import checkpoint_key
from bestiary.diffusion.latents import LatentCache
from bestiary.diffusion.progress import HISTORY
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.sheet import Sheet
from bestiary.diffusion.training import TrainingSettings, train
from bestiary.errors import BestiaryError
from bestiary.evaluation.judge import Judge
from bestiary.files import write_atomically
from pipeline import stage

LATENTS, ADAPTER, REPORT = Path("build/latents"), Path("models/adapter"), Path("reports/train")
STAGE_ONLY = {"sheet_animals", "sheet_seeds", "sheet_steps", "sheet_guidance_scale", "keep_checkpoints"}

with stage("train") as (params, run):
    training, validation = LatentCache.open(LATENTS, "train"), LatentCache.open(LATENTS, "val")
    base, sheet = params.base, params.train
    processes()  # gives each process its GPU
    pipeline = load_pipeline(base.model, base.revision)
    settings = TrainingSettings(seed=params.seed, **params.train.model_dump(exclude=STAGE_ONLY))
    commit = base_commit(base.model, base.revision)
    made_from = {
        "base": base.model,
        **({"base_revision": commit} if commit else {}),
        "base_sha256": base_sha256(base.model, base.revision),
        "data_sha256": training.data_sha256,
        "params": {name: value for name, value in asdict(settings).items() if name != "checkpoint_seconds"},
    }
    if made_from["base_sha256"] != training.base_sha256:
        raise BestiaryError(f"The latents were made with another base than {base.model}: run the encode stage again.")
    # DVC empties models/adapter before each run. The sheet and its judge may decide which step is the best.
    drawn = {"sheet": sheet.model_dump(include=STAGE_ONLY), "judge": params.judge.model_dump()}
    checkpoints = Path(".cache/train") / checkpoint_key(made_from | drawn)
    classes = sorted(set(training.images["class"]))
    shown = classes[:: max(1, len(classes) // sheet.sheet_animals)][: sheet.sheet_animals]
    prompts = [caption(by_folder(folder), CAPTION_TEMPLATES[0]) for folder in shown] * sheet.sheet_seeds
    seeds = [params.seed + number for number in range(sheet.sheet_seeds) for _ in shown]
    rows = Sheet(checkpoints / "sheet", [by_folder(folder).name for folder in shown])
    logged: set[int] = set()
    if run.is_main:
        judge = Judge.load(params.judge.model, params.judge.revision, device_and_dtype()[0].type)
        words = judge.text_features(prompts)

    def draw(step: int) -> float:
        """Add the pictures of this step to the sheet and return their CLIP score, 100 x the mean cosine."""
        pictures = generate(
            pipeline,
            prompts,
            seeds,
            steps=sheet.sheet_steps,
            guidance_scale=sheet.sheet_guidance_scale,
            scheduler="dpmsolver++",
            batch_size=8,
            resolution=params.encode.resolution,
        )
        rows.add(step, pictures[: len(shown)])
        for number, row in rows.save(REPORT / "sheet.png").items():
            if number not in logged:  # by itself, so that MLflow can put the runs' pictures of a step together
                run.log_image(row, "sheet", number)
                logged.add(number)
        if step and sheet.keep_checkpoints:
            save_adapter(pipeline.unet, checkpoints / "kept" / f"step-{step:06}", made_from)
        return 100 * float((judge.image_features(pictures) * words).sum(dim=1).mean())

    result = train(
        pipeline.unet,
        load_scheduler(base.model, base.revision),
        training,
        validation,
        settings,
        on_log=lambda step, numbers: run.log_metrics(numbers, step),
        on_validation=draw,
        checkpoints=checkpoints,
    )
    if run.is_main:
        proof = verify_adapter(save_adapter(pipeline.unet, ADAPTER, made_from), base.model, base.revision)
        shutil.rmtree(ADAPTER / "checkpoints", ignore_errors=True)
        if sheet.keep_checkpoints:
            shutil.copytree(checkpoints / "kept", ADAPTER / "checkpoints")
        history = pd.DataFrame(result.history, columns=list(HISTORY))
        write_atomically(REPORT / "history.csv", history.to_csv(index=False).encode())
        by_class = pd.Series(result.val_loss_by_class, name="val_loss").rename_axis("class")
        write_atomically(REPORT / "val_loss_by_class.csv", by_class.to_csv().encode())
        run.report(result.report() | {"adapter_sha256": proof.sha256})
        shutil.rmtree(checkpoints, ignore_errors=True)
