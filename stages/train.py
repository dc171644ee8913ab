"""Train stage: an adapter on the cached latents, with a sheet of the same prompts and seeds at each validation."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from PIL.Image import Image

from bestiary.animals import CAPTION_TEMPLATES, by_folder, caption
from bestiary.data.images import contact_sheet
from bestiary.diffusion.adapter import save_adapter, verify_adapter
from bestiary.diffusion.base import base_commit, base_sha256, device_and_dtype, load_pipeline, load_scheduler, processes
from bestiary.diffusion.checkpoints import checkpoint_key
from bestiary.diffusion.latents import LatentCache
from bestiary.diffusion.progress import HISTORY
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.training import TrainingSettings, train
from bestiary.errors import BestiaryError
from bestiary.evaluation.judge import Judge
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
    checkpoints = Path(".cache/train") / checkpoint_key(made_from)  # DVC empties models/adapter before each run
    classes = sorted(set(training.images["class"]))
    shown = classes[:: max(1, len(classes) // sheet.sheet_animals)][: sheet.sheet_animals]
    prompts = [caption(by_folder(folder), CAPTION_TEMPLATES[0]) for folder in shown] * sheet.sheet_seeds
    seeds = [params.seed + number for number in range(sheet.sheet_seeds) for _ in shown]
    rows: list[list[Image]] = []
    labels: list[str] = []
    if run.is_main:
        REPORT.mkdir(parents=True, exist_ok=True)
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
        rows.append(pictures[: len(shown)])
        labels.append(f"step {step}" if step else "base")
        names = [by_folder(folder).name for folder in shown]
        contact_sheet(rows, labels, names).save(REPORT / "sheet.png")
        row = (
            REPORT / "steps" / f"{step}.png"
        )  # by itself, so that MLflow can put the runs' pictures of a step together
        row.parent.mkdir(exist_ok=True)
        contact_sheet(rows[-1:], labels[-1:], names).save(row)
        run.log_image(row, "sheet", step)
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
        pd.DataFrame(result.history, columns=list(HISTORY)).to_csv(REPORT / "history.csv", index=False)
        by_class = pd.Series(result.val_loss_by_class, name="val_loss").rename_axis("class")
        by_class.to_csv(REPORT / "val_loss_by_class.csv")
        run.report(result.report() | {"adapter_sha256": proof.sha256})
        shutil.rmtree(checkpoints, ignore_errors=True)
