"""A whole evaluation on the bundled base and judge, as small as possible."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from bestiary.diffusion.base import load_pipeline
from bestiary.errors import BestiaryError
from bestiary.evaluation import comparison
from bestiary.evaluation.comparison import Compared, Evaluation
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.pictures import Jobs, PictureCache
from bestiary.evaluation.proof import Named, Photos, Prover
from bestiary.evaluation.report import EvaluationReport
from bestiary.evaluation.sweep import OperatingPoint
from bestiary.params import Evaluate, Model, Proof
from bestiary.subjects import Subject, Subjects

ROOT = Path(__file__).parents[2]

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
        "proof": None,
        "adapter_weight": None,
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


def test_a_sweep_of_one_class_takes_a_score_that_one_class_has(tmp_path: Path) -> None:
    for name in ("train", "val"):
        pd.DataFrame([{"path": f"my-cat/{name}.png", "class": "my-cat"}]).to_csv(tmp_path / f"{name}.csv", index=False)
    assert SETTINGS.sweep is not None
    sweep = SETTINGS.sweep.model_copy(update={"score": "margin"})
    settings = SETTINGS.model_copy(update={"sweep": sweep, "classes": None})
    nothing_loaded = Compared(None, tmp_path / "adapter", [], tmp_path, tmp_path)
    with pytest.raises(BestiaryError, match=r"evaluate\.sweep\.score is margin.*my-cat is the only one"):
        comparison.evaluate(nothing_loaded, settings, seed=0)


@pytest.fixture(scope="module")
def proved(
    base_folder: Path, judge: Judge, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluation, EvaluationReport]:
    """The evaluation of one subject: five photos of Pip, and four of other penguins."""
    folder = tmp_path_factory.mktemp("one")
    photos = sorted((ROOT / "examples" / "pip" / "photos" / "pip").glob("*.jpg"))[:5]
    for name, rows in (("train", photos[:3]), ("val", photos[3:])):
        table = pd.DataFrame([{"path": f"pip/{path.name}", "class": "pip"} for path in rows])
        table.to_csv(folder / f"{name}.csv", index=False)
    (folder / "pip").symlink_to(photos[0].parent)
    others = folder / "others"
    others.mkdir()
    (others / "pip").symlink_to(photos[0].parents[1] / "other-penguins")
    Subjects({"pip": Subject("pip", "sks penguin", "", class_word="penguin", given=True)}).write_to(folder)
    proof = Proof(
        contexts=["a drawing of {}", "a sketch of {}"],
        unrelated=["a photo of a crab"],
        seeds=2,
        class_seeds=2,
        image_judge=None,
    )
    changes = {"sweep": None, "classes": None, "proof": proof, "adapter_weight": 0.5}
    settings = SETTINGS.model_copy(update=changes)
    compared = Compared(load_pipeline(base_folder, device="cpu"), adapter, [judge], folder, folder, others)
    evaluation = comparison.evaluate(compared, settings, seed=5)
    point = OperatingPoint(adapter, "0" * 64, str(adapter), 1.0, 3.0)
    return evaluation, evaluation.report(point, stage_seconds=1.0)


def test_one_subject_is_proved_beside_its_text_scores(proved: tuple[Evaluation, EvaluationReport]) -> None:
    _, report = proved
    proof = report.only_subject
    assert proof is not None
    assert (proof.name, proof.class_word, proof.others_from) == ("sks penguin", "penguin", "photos")
    assert (proof.training_photos, proof.held_out_photos) == (3, 2)
    assert (proof.in_context.pictures, proof.class_leakage.pictures, proof.unrelated_leakage.pictures) == (4, 2, 2)
    assert proof.class_leakage.moved.mean > 0
    assert report.delta["fidelity"] == proof.fidelity.gain
    assert report.real["fidelity"] == proof.fidelity.ceiling
    assert report.delta["prompt_following"] == proof.in_context.prompt_difference
    assert [score.key for score in report.table] == ["fidelity", "prompt_following", "cmmd"]
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report


def test_without_a_sweep_the_adapter_has_the_weight_of_the_settings(
    proved: tuple[Evaluation, EvaluationReport], adapter: Path
) -> None:
    chosen = proved[0].chosen
    assert (chosen.checkpoint, chosen.sampling.adapter_weight) == (adapter, 0.5)


def test_each_picture_of_one_subject_has_its_fidelity_and_each_context_its_pictures(
    proved: tuple[Evaluation, EvaluationReport], tmp_path: Path
) -> None:
    evaluation, report = proved
    comparison.write(evaluation, tmp_path)
    table = pd.read_csv(tmp_path / "pictures.csv")
    assert table["adapter_fidelity"].mean() == pytest.approx(report.adapter["fidelity"].mean, abs=1e-3)
    assert table["base_fidelity"].mean() == pytest.approx(report.base["fidelity"].mean, abs=1e-3)
    assert Image.open(tmp_path / "contexts" / "pip.png").width > 0


def test_the_proof_draws_what_is_not_the_subject_with_seeds_of_its_own(
    proved: tuple[Evaluation, EvaluationReport],
) -> None:
    """What is subtracted from a picture must not be that picture."""
    drawn: list[Jobs] = []
    evaluation, _ = proved

    def draw(jobs: Jobs) -> list[Image.Image]:
        drawn.append(jobs)
        return [evaluation.base.images[0]] * len(jobs.seeds)

    class Blind:
        """Sees noise, a new one each time."""

        def class_tokens(self, images: list[Image.Image]) -> torch.Tensor:
            return torch.randn(len(images), 8, generator=torch.Generator().manual_seed(len(drawn)))

        image_features = text_features = class_tokens

    settings = Proof(contexts=["a drawing of {}"], unrelated=["a crab"], seeds=2, class_seeds=2, image_judge=None)
    blind: Any = Blind()
    prover = Prover(blind, blind, settings, "a photo of {}", lambda jobs: (draw(jobs), draw(jobs)), draw, 10, seed=0)
    photos = sorted((ROOT / "examples" / "pip" / "photos" / "pip").glob("*.jpg"))[:4]
    subject = Subject("pip", "sks penguin", "", class_word="penguin", given=True)
    named = Named(evaluation.base.images, evaluation.adapter.images)
    report = prover.prove(subject, named, Photos(photos[:2], photos[2:], [])).report
    assert report.others_from == "base"
    of_prompt: dict[str, list[tuple[int, ...]]] = {}
    for jobs in drawn:
        of_prompt.setdefault(jobs.prompts[0], []).append(tuple(jobs.seeds))
    # The class word: once to subtract, and twice, by base and adapter, to measure. In contexts the same.
    assert sorted(of_prompt) == ["a crab", "a drawing of a penguin", "a drawing of sks penguin", "a photo of a penguin"]
    centre, measured, again = of_prompt["a photo of a penguin"]
    assert measured == again
    assert not {*centre} & {*measured}
    plain, centre = of_prompt["a drawing of a penguin"]
    assert plain == of_prompt["a drawing of sks penguin"][0]
    assert not {*centre} & {*plain}


def test_prompts_are_followed_as_well_as_the_base_follows_the_prompt_that_is_scored(
    proved: tuple[Evaluation, EvaluationReport],
) -> None:
    """The base does not know the name. It is asked for the class word, which is what the pictures are scored by."""
    evaluation, _ = proved
    picture = evaluation.base.images[0]
    asked: dict[int, str] = {}

    def draw(jobs: Jobs) -> list[Image.Image]:
        images = [picture.copy() for _ in jobs.seeds]
        asked.update({id(image): prompt for image, prompt in zip(images, jobs.prompts, strict=True)})
        kept.extend(images)
        return images

    class Reader:
        """Scores 1 for a picture that was asked for by the class word, and sees noise otherwise."""

        def class_tokens(self, images: list[Image.Image]) -> torch.Tensor:
            return torch.randn(len(images), 8, generator=torch.Generator().manual_seed(len(kept)))

        def image_features(self, images: list[Image.Image]) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0] if asked[id(image)] in by_class else [0.0, 1.0] for image in images])

        def text_features(self, texts: list[str]) -> torch.Tensor:
            by_class.update(texts)
            return torch.tensor([[1.0, 0.0]] * len(texts))

    kept: list[Image.Image] = []
    by_class: set[str] = set()
    settings = Proof(contexts=["a drawing of {}"], unrelated=["a crab"], seeds=2, class_seeds=2, image_judge=None)
    reader: Any = Reader()
    prover = Prover(reader, reader, settings, "a photo of {}", lambda jobs: (draw(jobs), draw(jobs)), draw, 10, seed=0)
    photos = sorted((ROOT / "examples" / "pip" / "photos" / "pip").glob("*.jpg"))[:4]
    subject = Subject("pip", "sks penguin", "", class_word="penguin", given=True)
    named = Named(evaluation.base.images, evaluation.adapter.images)
    context = prover.prove(subject, named, Photos(photos[:2], photos[2:], [])).report.in_context
    assert by_class == {"a drawing of a penguin"}
    assert context.prompt_following.base.mean == 100
    assert context.prompt_following.adapter.mean == 0


def test_photos_are_decoded_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counting:
        def class_tokens(self, images: list[Image.Image]) -> torch.Tensor:
            sizes.append(len(images))
            return torch.ones(len(images), 2)

    monkeypatch.setattr("bestiary.evaluation.proof.BATCH_SIZE", 2)
    counting: Any = Counting()
    settings = Proof(contexts=["{}"], unrelated=["a crab"], seeds=2, class_seeds=2, image_judge=None)
    prover = Prover(counting, counting, settings, "{}", lambda _: ([], []), lambda _: [], 10, seed=0)
    photos = sorted((ROOT / "examples" / "pip" / "photos" / "pip").glob("*.jpg"))[:5]
    assert prover._see_files(photos).shape == (5, 2)
    assert sizes == [2, 2, 1]


def test_a_wrong_image_judge_ends_an_evaluation_before_it_draws(
    base_folder: Path, judge: Judge, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = sorted((ROOT / "examples" / "pip" / "photos" / "pip").glob("*.jpg"))[:4]
    for name, rows in (("train", photos[:2]), ("val", photos[2:])):
        table = pd.DataFrame([{"path": path.name, "class": "pip"} for path in rows])
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    Subjects({"pip": Subject("pip", "sks penguin", "", class_word="penguin", given=True)}).write_to(tmp_path)
    nowhere = Model(model=str(tmp_path / "nowhere"), revision=None)
    proof = Proof(contexts=["{}"], unrelated=["a crab"], seeds=2, class_seeds=2, image_judge=nowhere)
    settings = SETTINGS.model_copy(update={"sweep": None, "classes": None, "proof": proof})
    monkeypatch.setattr("bestiary.evaluation.pictures.draw_pairs", lambda *_, **__: pytest.fail("it drew"))
    with pytest.raises(BestiaryError, match=r"The image judge .*nowhere"):
        comparison.evaluate(Compared(None, adapter, [judge], photos[0].parent, tmp_path), settings, seed=0)
