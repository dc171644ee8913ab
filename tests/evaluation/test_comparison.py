"""A whole evaluation on the bundled base and judge, as small as possible."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bestiary.diffusion.base import load_pipeline
from bestiary.errors import BestiaryError
from bestiary.evaluation import comparison
from bestiary.evaluation.comparison import Compared, Evaluation
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.pictures import PictureCache
from bestiary.evaluation.report import EvaluationReport
from bestiary.evaluation.sweep import OperatingPoint
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
    """A folder with random pictures of three classes and their manifests."""
    folder = tmp_path_factory.mktemp("split")
    random = np.random.default_rng(0)
    for name, count in (("train", 3), ("val", 2)):
        rows = []
        for subject in CLASSES:
            (folder / subject).mkdir(exist_ok=True)
            for number in range(count):
                path = f"{subject}/{name}{number}.png"
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / path)
                rows.append({"path": path, "class": subject})
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def evaluation(
    base_folder: Path, judge: Judge, adapter: Path, split: Path, tmp_path_factory: pytest.TempPathFactory
) -> Evaluation:
    """The result of an evaluation by two judges, with a sweep."""
    compared = Compared(load_pipeline(base_folder, device="cpu"), adapter, [judge, judge], clean=split, split=split)
    cache = PictureCache(tmp_path_factory.mktemp("cache"), base_sha256="")
    return comparison.evaluate(compared, SETTINGS, seed=5, cache=cache)


@pytest.fixture(scope="module")
def report(evaluation: Evaluation) -> EvaluationReport:
    sampling = evaluation.chosen.sampling
    point = OperatingPoint(
        evaluation.chosen.checkpoint,
        "0" * 64,
        str(evaluation.chosen.checkpoint),
        sampling.adapter_weight,
        sampling.guidance_scale,
    )
    return evaluation.report(point, stage_seconds=100.0)


def test_only_the_chosen_classes_are_drawn_and_the_judge_chooses_among_all(
    evaluation: Evaluation, report: EvaluationReport
) -> None:
    assert report.images == 4
    assert list(report.per_class) == ["bee", "tiger"]
    assert report.classes == tuple(evaluation.texts.classes) == CLASSES


def test_the_sweep_chooses_on_other_seeds_than_the_evaluation_uses(
    evaluation: Evaluation, report: EvaluationReport
) -> None:
    assert evaluation.sweep is not None
    assert evaluation.jobs.seeds == [5, 6, 7, 8]
    table = evaluation.sweep.table
    assert table["pictures"].tolist() == [2, 2]
    best = table.iloc[int(table["clip_score"].argmax())]
    chosen, point = evaluation.chosen.sampling, report.operating_point
    assert (point.scale, point.guidance_scale) == (best["scale"], 2.0) == (chosen.adapter_weight, 2.0)


def test_two_equal_judges_give_the_same_scores(report: EvaluationReport) -> None:
    second = report.second_judge
    assert second is not None
    for row in ("base", "adapter", "delta", "real", "floor"):
        assert getattr(second, row) == getattr(report, row)


def test_the_report_states_what_the_time_was_spent_on(report: EvaluationReport) -> None:
    seconds = report.seconds
    assert min(seconds["draw_s"] or 0, seconds["judge_s"] or 0, seconds["score_s"] or 0) > 0
    assert 0 < (seconds["overhead_share"] or 0) < 1
    assert seconds["stage_s"] == 100.0
    assert report.scale_zero.model_dump() == {"pictures": 2, "different": 0}


def test_the_results_are_everything_but_the_seconds_in_a_fixed_order(report: EvaluationReport) -> None:
    assert list(report.results()) == [
        "images",
        "base",
        "adapter",
        "delta",
        "real",
        "floor",
        "per_template",
        "per_class",
        "worst_classes",
        "memorisation",
        "classes",
        "scale_zero",
        "operating_point",
        "second_judge",
        "adapter_sha256",
    ]


def test_figures_are_written_and_those_of_earlier_classes_removed(evaluation: Evaluation, tmp_path: Path) -> None:
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


def test_one_class_alone_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    for name in ("train", "val"):
        pd.DataFrame([{"path": f"my-cat/{name}.png", "class": "my-cat"}]).to_csv(tmp_path / f"{name}.csv", index=False)
    nothing_loaded = Compared(None, tmp_path / "adapter", [], tmp_path, tmp_path)
    with pytest.raises(BestiaryError, match=r"my-cat is the only class.*bestiary generate .*--adapter models/adapter"):
        comparison.evaluate(nothing_loaded, SETTINGS, seed=0)
