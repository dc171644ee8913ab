from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from support.settings import train_settings
from support.tiny import build_base

from bestiary.diffusion.base import load_pipeline
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.watching import SheetPlan, TrainingWatch
from bestiary.subjects import subject_of

SHOWN = [subject_of(name) for name in ("bee", "cat", "lion", "owl")]
SETTINGS = train_settings(sheet_animals=2, sheet_seeds=2, sheet_steps=1)


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return load_pipeline(build_base(tmp_path_factory.mktemp("base")), device="cpu")


class GreenJudge(Judge):
    """Finds each picture's first pixel's green in it, of 255, and the same in every text."""

    def __init__(self) -> None:
        pass

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.ones(len(texts), 1)

    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.tensor([[float(np.asarray(image)[0, 0, 1]) / 255] for image in images])


def watch(pipeline: StableDiffusionPipeline, folder: Path, at_once: int | None = None) -> TrainingWatch:
    plan = SheetPlan(SHOWN, SETTINGS, SETTINGS.sheet_sampling(32), seed=5, at_once=at_once)
    return TrainingWatch(pipeline, GreenJudge(), plan, folder=folder)


def test_the_sheet_shows_classes_evenly_chosen_with_their_own_seeds(
    tiny_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    watching = watch(tiny_pipeline, tmp_path / "rows")
    prompts = ["a photo of a bee", "a photo of a lion"]
    assert watching.jobs == [(prompt, seed) for seed in (5, 6) for prompt in prompts]
    assert watching.sheet.columns == ["bee", "lion"]


def test_the_score_is_the_mean_cosine_of_all_seeds_times_100(
    tiny_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    watching = watch(tiny_pipeline, tmp_path / "rows")
    score = watching.draw(0)
    assert 0 < score < 100
    assert watching.draw(4) == score  # the same weights draw the same pictures
    rows = watching.save_sheet(tmp_path / "sheet.png")
    assert [path.name for path in sorted((tmp_path / "rows").iterdir())] == ["00000000", "00000004"]
    assert len(list((tmp_path / "rows" / "00000004").iterdir())) == 2  # the first seed's pictures only
    assert list(rows) == [0, 4]


def test_the_sheet_can_be_drawn_one_picture_at_a_time(tiny_pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    rows: list[set[int]] = []
    for at_once in (None, 1):
        rows.append(set())
        hook = tiny_pipeline.unet.register_forward_pre_hook(lambda _, inputs: rows[-1].add(len(inputs[0])))
        watch(tiny_pipeline, tmp_path / str(at_once), at_once).draw(0)
        hook.remove()
    assert rows == [{8}, {2}]  # each picture is guided


def test_saving_the_sheet_returns_only_the_rows_that_are_new(
    tiny_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    watching = watch(tiny_pipeline, tmp_path / "rows")
    watching.draw(0)
    assert list(watching.save_sheet(tmp_path / "sheet.png")) == [0]
    watching.draw(4)
    assert list(watching.save_sheet(tmp_path / "sheet.png")) == [4]
    resumed = watch(tiny_pipeline, tmp_path / "rows")
    resumed.draw(0)
    assert list(resumed.save_sheet(tmp_path / "sheet.png")) == [0, 4]  # a resumed run logs to a new MLflow run
