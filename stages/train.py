"""Train stage: an adapter on the cached latents, with a sheet of the same prompts and seeds at each validation."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from PIL.Image import Image

from bestiary.animals import by_folder, caption
from bestiary.data.images import contact_sheet
from bestiary.diffusion.adapter import save_adapter, verify_adapter
from bestiary.diffusion.base import base_sha256, load_pipeline, load_scheduler
from bestiary.diffusion.checkpoints import checkpoint_key
from bestiary.diffusion.latents import LatentCache
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.training import TrainingSettings, train
from bestiary.errors import BestiaryError
from pipeline import stage

LATENTS, ADAPTER, REPORT = Path("build/latents"), Path("models/adapter"), Path("reports/train")

with stage("train") as (params, run):
    training, validation = LatentCache.open(LATENTS, "train"), LatentCache.open(LATENTS, "val")
    pipeline = load_pipeline(params.base.model, params.base.revision)
    settings = TrainingSettings(seed=params.seed, **params.train.model_dump(exclude={"sheet_animals"}))
    classes = sorted(set(training.images["class"]))
    shown = classes[:: max(1, len(classes) // params.train.sheet_animals)][: params.train.sheet_animals]
    rows: list[list[Image]] = []
    labels: list[str] = []
    REPORT.mkdir(parents=True, exist_ok=True)

    def draw(step: int) -> None:
        """Add the pictures of this step to the sheet, drawn as the evaluation will draw them."""
        prompts = [caption(by_folder(folder), params.evaluate.template) for folder in shown]
        how = params.evaluate.model_dump(include={"steps", "guidance_scale", "scheduler", "batch_size"})
        rows.append(generate(pipeline, prompts, [params.seed] * len(prompts), **how))
        labels.append(f"step {step}" if step else "base")
        sheet = REPORT / "sheet.png"
        part = REPORT / "sheet.part.png"  # the one before may still be on its way to MLflow
        contact_sheet(rows, labels, [by_folder(folder).name for folder in shown]).save(part)
        run.log_artifact(part.replace(sheet))

    made_from = {
        "base": params.base.model,
        "base_sha256": base_sha256(params.base.model, params.base.revision),
        "data_sha256": training.data_sha256,
        "params": asdict(settings),
    }
    if made_from["base_sha256"] != training.base_sha256:
        raise BestiaryError(
            f"The latents were made with another base than {params.base.model}: run the encode stage again."
        )
    checkpoints = Path(".cache/train") / checkpoint_key(made_from)  # DVC empties models/adapter before each run
    result = train(
        pipeline.unet,
        load_scheduler(params.base.model, params.base.revision),
        training,
        validation,
        settings,
        on_log=lambda step, numbers: run.log_metrics(numbers, step),
        on_validation=draw,
        checkpoints=checkpoints,
    )
    verify_adapter(save_adapter(pipeline.unet, ADAPTER, made_from), params.base.model, params.base.revision)
    pd.DataFrame(result.history).to_csv(REPORT / "history.csv", index=False)
    pd.Series(result.val_loss_by_class, name="val_loss").rename_axis("class").to_csv(REPORT / "val_loss_by_class.csv")
    run.report(result.report())
    shutil.rmtree(checkpoints, ignore_errors=True)
