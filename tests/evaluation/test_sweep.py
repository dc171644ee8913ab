from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bestiary.diffusion.adapter import adapter_sha256
from bestiary.diffusion.adapter_format import FILE_NAME
from bestiary.diffusion.adapter_reading import read_adapter
from bestiary.diffusion.containment import contained
from bestiary.diffusion.stored_adapter import adapter_file
from bestiary.errors import BestiaryError
from bestiary.evaluation import pictures, sweep
from bestiary.evaluation.pictures import Jobs
from bestiary.evaluation.scoring import Array, ClassTexts, JudgedImages, unit
from bestiary.evaluation.sweep import Candidate
from bestiary.samplers import Sampling

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PROMPTS = np.eye(3)
TEXTS = ClassTexts(["bee", "owl", "tiger"], PROMPTS, {"a photo of {}": PROMPTS})
SAMPLING = Sampling("ddim", steps=1, guidance_scale=3.0)


def draw(candidate: Candidate) -> JudgedImages:
    """Features that score best for the second checkpoint with weight 0.8 and guidance scale 4."""
    weight, guidance_scale = candidate.sampling.adapter_weight, candidate.sampling.guidance_scale
    miss = abs(weight - 0.8) + abs(guidance_scale - 4) / 10 + (candidate.checkpoint.name != "second")
    features: Array = unit(PROMPTS + miss)
    return JudgedImages(features, np.arange(3))


def test_a_sweep_scores_every_combination() -> None:
    candidates = sweep.combine([Path("first"), Path("second")], [0.5, 0.8, 1.0], [2.0, 4.0], SAMPLING)
    table = sweep.sweep(candidates, draw, TEXTS)
    assert len(table) == len(candidates) == 12
    best = int(table["clip_score"].argmax())
    assert candidates[best] == Candidate(Path("second"), replace(SAMPLING, adapter_weight=0.8, guidance_scale=4.0))
    assert table.iloc[best].to_dict() == {
        "checkpoint": "second",
        "scale": 0.8,
        "guidance_scale": 4.0,
        "pictures": 3,
        "clip_score": pytest.approx(100),
        "margin": pytest.approx(100),
        "top1": 100,
        "top5": 100,
    }


def test_the_checkpoints_are_those_that_training_saved(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"train\.keep_checkpoints"):
        sweep.checkpoints(tmp_path)
    for step in (200, 100):
        folder = tmp_path / "checkpoints" / f"step-{step:06}"
        folder.mkdir(parents=True)
        (folder / FILE_NAME).touch()
    assert [path.name for path in sweep.checkpoints(tmp_path)] == [tmp_path.name, "step-000100", "step-000200"]


def test_the_operating_point_is_read_as_it_was_written_and_replaces_an_earlier_one(
    adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "operating_point"
    with pytest.raises(BestiaryError, match="dvc repro evaluate"):
        sweep.read_operating_point(folder)
    weighted = sweep.write_operating_point(folder, adapter, 0.5, 4.0)
    assert sweep.read_operating_point(folder) == weighted
    assert weighted.adapter == folder
    assert weighted.adapter_sha256 == adapter_sha256(folder) != adapter_sha256(adapter)
    plain = sweep.write_operating_point(folder, adapter, 1.0, 3.0)
    assert sweep.read_operating_point(folder) == plain
    assert plain.adapter == adapter
    assert [path.name for path in folder.iterdir()] == ["operating_point.json"]
    assert json.loads((folder / "operating_point.json").read_text()) == {
        "adapter": adapter.as_posix(),
        "adapter_sha256": adapter_sha256(adapter),
        "checkpoint": str(adapter),
        "scale": 1.0,
        "guidance_scale": 3.0,
    }


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"adapter": 1}'])
def test_a_damaged_operating_point_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "operating_point.json").write_text(content)
    with pytest.raises(BestiaryError, match=r"operating_point\.json"):
        sweep.read_operating_point(tmp_path)


def test_an_adapter_with_a_weight_in_its_alpha_draws_what_the_source_draws_with_that_weight(
    pipeline: StableDiffusionPipeline, adapter: Path, tmp_path: Path
) -> None:
    def pixels(path: Path, weight: float) -> Array:
        jobs, sampling = Jobs([0], ["a tiger"], [0]), replace(SAMPLING, adapter_weight=weight)
        return np.asarray(pictures.draw(pipeline, path, jobs, sampling, batch_size=1)[0], dtype=float)

    strong, plain = pixels(adapter, 4.0), pixels(adapter, 1.0)
    assert np.abs(strong - plain).max() > 4
    assert np.abs(pixels(sweep.write_weighted_adapter(adapter, 4.0, tmp_path), 1.0) - strong).max() <= 1


def test_a_copy_with_a_weight_says_which_adapter_it_contains(adapter: Path, tmp_path: Path) -> None:
    half = sweep.write_weighted_adapter(adapter, 0.5, tmp_path / "half")
    quarter = sweep.write_weighted_adapter(half, 0.5, tmp_path / "quarter")
    for copy, inside in ((half, {adapter_sha256(adapter)}), (quarter, {adapter_sha256(adapter), adapter_sha256(half)})):
        assert contained(read_adapter(adapter_file(copy))) == inside
