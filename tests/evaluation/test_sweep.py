import json
from pathlib import Path

import numpy as np
import pytest

from bestiary.diffusion.adapter import FILE_NAME, adapter_sha256
from bestiary.errors import BestiaryError
from bestiary.evaluation import pictures, sweep
from bestiary.evaluation.scoring import Array, Pictures, Words, unit

PROMPTS = np.eye(3)
WORDS = Words(["bee", "owl", "tiger"], PROMPTS, {"a photo of {}": PROMPTS})


def look(adapter: Path, scale: float, guidance_scale: float) -> Pictures:
    """Pictures that are best at scale 0.8 and guidance 4 of the second checkpoint."""
    miss = abs(scale - 0.8) + abs(guidance_scale - 4) / 10 + (adapter.name != "second")
    features: Array = unit(PROMPTS + miss)
    return Pictures(features, np.arange(3))


def test_a_sweep_tries_every_combination_and_finds_the_best() -> None:
    table = sweep.sweep(look, WORDS, [Path("first"), Path("second")], [0.5, 0.8, 1.0], [2.0, 4.0])
    assert len(table) == 12
    assert sweep.best(table, "clip_score") == {
        "checkpoint": "second",
        "scale": 0.8,
        "guidance_scale": 4.0,
        "pictures": 3,
        "clip_score": pytest.approx(100),
        "margin": pytest.approx(100),
        "top1": 100,
        "top5": 100,
    }


def test_the_checkpoints_are_those_that_the_training_kept(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"^There are no checkpoints in .*: set train\.keep_checkpoints"):
        sweep.checkpoints(tmp_path)
    for step in (200, 100):
        folder = tmp_path / "checkpoints" / f"step-{step:06}"
        folder.mkdir(parents=True)
        (folder / FILE_NAME).touch()
    assert [path.name for path in sweep.checkpoints(tmp_path)] == [tmp_path.name, "step-000100", "step-000200"]


def test_the_operating_point_is_read_as_it_was_settled_and_leaves_nothing_of_the_one_before(
    adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "operating_point"
    with pytest.raises(BestiaryError, match="run `dvc repro evaluate`"):
        sweep.read_operating_point(folder)
    scaled = sweep.settle(folder, adapter, 0.5, 4.0)
    assert sweep.read_operating_point(folder) == scaled
    assert scaled.adapter == folder
    assert scaled.adapter_sha256 == adapter_sha256(folder) != adapter_sha256(adapter)
    plain = sweep.settle(folder, adapter, 1.0, 3.0)
    assert sweep.read_operating_point(folder) == plain
    assert plain.adapter == adapter
    assert [path.name for path in folder.iterdir()] == [sweep.POINT]
    assert json.loads((folder / sweep.POINT).read_text())["guidance_scale"] == 3.0


def test_an_adapter_with_the_scale_in_it_draws_what_it_draws_at_that_scale(
    pipeline, adapter: Path, tmp_path: Path
) -> None:
    how = {"steps": 1, "guidance_scale": 3.0, "scheduler": "ddim", "batch_size": 1}

    def draw(path: Path, scale: float) -> Array:
        return np.asarray(pictures.draw(pipeline, path, ["a tiger"], [0], scale=scale, **how)[0], dtype=float)

    strong, plain = draw(adapter, 4.0), draw(adapter, 1.0)
    assert np.abs(strong - plain).max() > 4
    assert np.abs(draw(sweep.scaled_adapter(adapter, 4.0, tmp_path), 1.0) - strong).max() <= 1
