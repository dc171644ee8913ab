"""An evaluation from end to end on the embedded base and judge, as small as it can be."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bestiary.diffusion.base import load_pipeline
from bestiary.evaluation import comparison
from bestiary.evaluation.comparison import Evaluation
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.pictures import Kept
from bestiary.params import Evaluate

CLASSES = ("antelope", "bee", "tiger")
SETTINGS = Evaluate.model_validate(
    {
        "template": "a photo of {}",
        "bootstrap_resamples": 50,
        "seeds": 2,
        "steps": 1,
        "guidance_scale": 3.0,
        "scheduler": "ddim",
        "batch_size": 4,
        "guidance_interval": None,
        "classes": ["bee", "tiger"],
        "second_judge": None,
        "sweep": {
            "scales": [0.5, 1.0],
            "guidance_scales": [2.0],
            "checkpoints": False,
            "seeds": 1,
            "score": "clip_score",
        },
    }
)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of random pictures with their manifests beside them."""
    folder = tmp_path_factory.mktemp("split")
    random = np.random.default_rng(0)
    for name, count in (("train", 3), ("val", 2)):
        rows = []
        for animal in CLASSES:
            (folder / animal).mkdir(exist_ok=True)
            for number in range(count):
                path = f"{animal}/{name}{number}.png"
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / path)
                rows.append({"path": path, "class": animal})
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def evaluation(base_folder: Path, judge: Judge, adapter: Path, split: Path, tmp_path_factory) -> Evaluation:
    kept = Kept(tmp_path_factory.mktemp("kept"), {})
    pipeline = load_pipeline(base_folder, device="cpu")
    return comparison.evaluate(pipeline, adapter, [judge, judge], split, split, SETTINGS, seed=5, kept=kept)


def test_only_the_classes_that_are_asked_for_are_drawn_and_all_are_there_to_be_mistaken_for(
    evaluation: Evaluation,
) -> None:
    assert evaluation.report["images"] == 4
    assert list(evaluation.report["per_class"]) == ["bee", "tiger"]
    assert list(evaluation.words.classes) == list(CLASSES)


def test_the_sweep_chose_on_seeds_that_the_evaluation_does_not_use(evaluation: Evaluation) -> None:
    assert evaluation.swept is not None
    assert evaluation.jobs.seeds == [5, 6, 7, 8]
    assert evaluation.swept["pictures"].tolist() == [2, 2]
    best = evaluation.swept.loc[evaluation.swept["clip_score"].idxmax()]
    point = evaluation.report["operating_point"]
    assert (point["scale"], point["guidance_scale"]) == (best["scale"], 2.0) == (evaluation.scale, 2.0)


def test_a_second_judge_that_is_the_first_says_the_same(evaluation: Evaluation) -> None:
    second = evaluation.report["second_judge"]
    assert second == {row: evaluation.report[row] for row in ("base", "adapter", "delta", "real", "floor")}


def test_the_report_says_where_the_time_went(evaluation: Evaluation) -> None:
    seconds = evaluation.report["seconds"]
    assert min(seconds["draw_s"], seconds["judge_s"], seconds["score_s"]) > 0
    assert 0 < seconds["overhead_share"] < 1
    assert evaluation.report["scale_zero"] == {"pictures": 2, "different": 0}


def test_everything_is_drawn_beside_the_report_and_what_is_gone_goes(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "unicorn.jpg").touch()
    comparison.write(evaluation, tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "sheet.png",
        "memorisation.png",
        "confusion.png",
        "per_class.png",
        "per_class.csv",
        "pictures.csv",
        "sweep.png",
        "sweep.csv",
        "pictures/bee.jpg",
        "pictures/tiger.jpg",
    }
