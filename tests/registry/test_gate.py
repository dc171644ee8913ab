import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.registry import RULES, evaluation, one_subject, write_pictures

from bestiary.evaluation.report import Estimate, EvaluationReport
from bestiary.params import Evaluate
from bestiary.registry.gate import (
    CHALLENGER,
    CHAMPION,
    ChampionComparison,
    Decision,
    champion_score,
    decide,
    measurement_hash,
    paired_difference,
)

if TYPE_CHECKING:
    from bestiary.evaluation.scoring import ClassTexts, JudgedImages

ROOT = Path(__file__).parents[2]


def test_an_adapter_that_reliably_beats_the_base_becomes_the_champion() -> None:
    decision, reasons = decide(evaluation(gain=5.0), RULES, None)
    assert decision == CHAMPION
    assert reasons == [
        "The adapter beats the base: margin over other subjects +5.00 (95 % interval +4.00 to +6.00).",
        "There is no other champion.",
    ]


def test_an_interval_that_touches_zero_does_not_pass_the_gate() -> None:
    decision, reasons = decide(evaluation(gain=1.0, half_width=1.0), RULES, None)
    assert decision == CHALLENGER
    assert reasons == [
        "The adapter does not reliably beat the base: margin over other subjects +1.00 (95 % interval +0.00 to +2.00)."
    ]


def test_an_adapter_that_memorises_stays_challenger() -> None:
    decision, reasons = decide(evaluation(copied=0.5), RULES, None)
    assert decision == CHALLENGER
    assert reasons == [
        "The adapter copies its training images: 50% of its pictures look copied (95 % interval 40% to 60%), and the "
        "limit is 10%."
    ]


@pytest.mark.parametrize(
    ("mean", "decision", "words"), [(0.5, CHAMPION, "not worse than the champion"), (-0.5, CHALLENGER, "is better")]
)
def test_the_champion_is_replaced_only_by_an_adapter_that_is_not_worse(mean: float, decision: str, words: str) -> None:
    rival = ChampionComparison(3, Estimate(mean=mean, ci95=(mean - 1, mean + 1)))
    got, reasons = decide(evaluation(), RULES, rival)
    assert got == decision
    assert words in reasons[-1]
    assert "version 3" in reasons[-1]


def test_a_champion_that_was_measured_differently_is_not_replaced() -> None:
    decision, reasons = decide(evaluation(), RULES, ChampionComparison(3, None))
    assert decision == CHALLENGER
    assert "version 3" in reasons[0]
    assert "cannot be compared" in reasons[0]


# ---- two tables of pictures ----


def test_the_difference_to_the_champion_is_paired_by_prompt_and_seed(tmp_path: Path) -> None:
    mine, theirs = (write_pictures(tmp_path / f"{gain}.csv", gain) for gain in (5.0, 3.0))
    difference = paired_difference(mine, theirs, "margin")
    assert difference is not None
    # The seeds' own scores differ by up to 0.7, which pairing takes out.
    assert (difference.mean, *difference.ci95) == pytest.approx((2.0, 2.0, 2.0))
    top1 = paired_difference(mine, theirs, "top1")
    assert top1 is not None
    assert top1.mean == 0.0


def test_tables_of_different_seeds_are_not_compared(tmp_path: Path) -> None:
    mine, theirs = (write_pictures(tmp_path / f"{seeds}.csv", 5.0, seeds) for seeds in (8, 7))
    assert paired_difference(mine, theirs, "margin") is None


# ---- what makes two measurements alike ----

EVALUATE = Evaluate(
    template="a photo of {}",
    bootstrap_resamples=1000,
    seeds=2,
    steps=5,
    guidance_scale=3.0,
    scheduler="ddim",
    batch_size=4,
    guidance_interval=None,
    classes=None,
    second_judge=None,
    proof=None,
    adapter_weight=None,
    sweep=None,
)


def measured(report: EvaluationReport, settings: Evaluate, judge: str = "judge", seed: int = 0) -> str:
    return measurement_hash(report, settings, base_sha256="base", judge=judge, resolution=64, seed=seed)


@pytest.mark.parametrize("change", [{"steps": 6}, {"seeds": 3}, {"guidance_interval": (0.5, 5.0)}, {"template": "{}"}])
def test_adapters_measured_with_different_settings_are_not_alike(change: dict[str, object]) -> None:
    assert measured(evaluation(), EVALUATE) != measured(evaluation(), EVALUATE.model_copy(update=change))


def test_adapters_measured_by_different_judges_seeds_classes_or_guidance_are_not_alike() -> None:
    report = evaluation()
    point = report.operating_point.model_copy(update={"guidance_scale": 4.0})
    others = {
        measured(report, EVALUATE),
        measured(report, EVALUATE, judge="another"),
        measured(report, EVALUATE, seed=1),
        measured(report.model_copy(update={"classes": ("owl", "zebra")}), EVALUATE),
        measured(evaluation(gains_by_class={"owl": 1.0}), EVALUATE),
        measured(report.model_copy(update={"operating_point": point}), EVALUATE),
    }
    assert len(others) == 6


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"bootstrap_resamples": 500}, {"guidance_scale": 9.0}])
def test_settings_that_do_not_change_the_pictures_leave_measurements_alike(change: dict[str, object]) -> None:
    better = evaluation("other adapter", gain=9.0)
    assert measured(evaluation(), EVALUATE) == measured(better, EVALUATE.model_copy(update=change))


# ---- real pictures ----


def test_an_adapter_of_one_subject_that_keeps_every_rule_becomes_the_champion() -> None:
    decision, reasons = decide(one_subject(), RULES, None)
    assert decision == CHAMPION
    assert reasons == [
        "The judge tells sks penguin from other individuals.",
        "Its pictures look like sks penguin: fidelity is above half of the way from other individuals to the real "
        "photos (0.80 (95 % interval 0.70 to 0.90) of the way).",
        "It beats the base: fidelity +7.00 (95 % interval +5.00 to +9.00).",
        "It does not ignore the name in new contexts: fidelity there is +15.00 (95 % interval +10.00 to +20.00) above "
        "the base's pictures of the class word.",
        "It follows prompts: +1.00 (95 % interval -1.00 to +3.00) CLIP score against the base's pictures of the class "
        "word.",
        "It leaves pictures of the class word alone: leakage 8.50 (95 % interval 5.00 to 12.00).",
        "It does not copy its training photos.",
        "There is no other champion.",
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"above_half": (-0.1, 4.0)}, "Its pictures may not show sks penguin: fidelity is not reliably above half"),
        ({"gain": (-1.0, 1.0)}, "It does not reliably beat the base: fidelity"),
        ({"in_context": (-5.0, 5.0)}, "It may ignore the name in new contexts"),
        (
            {"prompt": (-2.1, 1.0)},
            "It may follow prompts worse than the base does with the class word: .* and the limit is -2",
        ),
        ({"leakage": (20.0, 30.1)}, "It changes pictures of the class word: leakage 25.05 .* and the limit is 30"),
        ({"copying": (0.51, 1.0)}, "It copies its training photos: 0.76 .* and the limit is 0.5"),
    ],
)
def test_an_adapter_of_one_subject_that_breaks_one_rule_stays_challenger(
    changes: dict[str, tuple[float, float]], reason: str
) -> None:
    decision, reasons = decide(one_subject(**changes), RULES, None)
    assert decision == CHALLENGER
    assert len(reasons) == 1
    assert re.match(reason, reasons[0])


def test_copying_that_cannot_be_seen_is_left_to_a_person() -> None:
    decision, reasons = decide(one_subject(copying=None), RULES, None)
    assert decision == CHALLENGER
    assert reasons == ["Whether it copies its training photos is unknown: too few photos are held out. Add photos."]


def test_likeness_proves_nothing_when_the_judge_does_not_tell_the_subject_from_others() -> None:
    decision, reasons = decide(one_subject(way=None), RULES, None)
    assert decision == CHALLENGER
    assert reasons[0].startswith("The judge does not tell sks penguin from other individuals for certain")


def test_one_subject_without_a_proof_never_becomes_the_champion() -> None:
    report = one_subject().model_copy(update={"proofs": {}, "per_class": {"pip": one_subject().per_class["owl"]}})
    decision, reasons = decide(report, RULES, None)
    assert decision == CHALLENGER
    assert reasons[0].startswith("One subject alone is proved by its pictures")


def test_each_of_several_subjects_with_invented_names_must_prove_itself() -> None:
    """A text judge does not know the names, so the margin alone would let a wrong individual pass."""
    several = evaluation(gain=9.0)
    proofs = {"owl": one_subject().proofs["pip"], "tiger": one_subject(above_half=(-0.1, 4.0)).proofs["pip"]}
    proved = {"owl": proofs["owl"], "tiger": proofs["owl"]}
    assert decide(several.model_copy(update={"proofs": proved}), RULES, None).alias == CHAMPION
    decision, reasons = decide(several.model_copy(update={"proofs": proofs}), RULES, None)
    assert decision == CHALLENGER
    assert [reason[:46] for reason in reasons] == ["sks penguin: Its pictures may not show sks pen"]


def test_a_champion_of_another_subject_is_named_and_not_compared() -> None:
    decision, reasons = decide(one_subject(), RULES, ChampionComparison(3, None, teaches="sks cat"))
    assert decision == CHALLENGER
    assert len(reasons) == 1
    assert reasons[0].startswith("The champion, version 3, teaches something else (sks cat)")
    assert "register.name" in reasons[0]


def test_adapters_of_one_subject_are_compared_by_fidelity_on_the_same_photos() -> None:
    report = one_subject()
    assert champion_score(report, RULES) == "fidelity"
    assert champion_score(evaluation(), RULES) == "margin"
    settings = Evaluate.model_construct(**dict.fromkeys(Evaluate.model_fields))
    proof = next(iter(report.proofs.values()))
    other = report.model_copy(update={"proofs": {"pip": proof.model_copy(update={"photos_sha256": "1" * 64})}})

    def measured(report: EvaluationReport) -> str:
        return measurement_hash(report, settings, base_sha256="", judge="", resolution=64, seed=0)

    assert measured(report) != measured(other)
    assert measured(report) == measured(one_subject())


@dataclass(frozen=True)
class Judged:
    """The judge's features of three sets of real images of four animals, one of them as if an adapter had drawn it."""

    texts: "ClassTexts"
    train: "JudgedImages"
    real: "JudgedImages"
    drawn: "JudgedImages"
    base: "JudgedImages"  # every other picture shows another animal


@pytest.fixture(scope="module")
def judged(judge_folder: Path) -> Judged:
    from PIL import Image

    from bestiary.evaluation import pictures
    from bestiary.evaluation.judge import Judge

    judge, classes, count = Judge.load(str(judge_folder)), ["owl", "panda", "tiger", "zebra"], 8
    labels = np.repeat(np.arange(len(classes)), count)

    def take(first: int) -> "JudgedImages":
        files = [sorted((ROOT / "samples" / name).glob("*.jpg"))[first : first + count] for name in classes]
        return pictures.view(judge, [Image.open(file).convert("RGB") for row in files for file in row], labels.tolist())

    texts = pictures.read_class_texts(judge, classes, "a photo of {}")
    drawn = take(2 * count)
    wrong = np.roll(drawn.features, count, axis=0)  # the animal before
    base = type(drawn)(np.where(np.arange(len(labels))[:, None] % 2, drawn.features, wrong), labels)
    return Judged(texts, take(0), take(count), drawn, base)


def decision_on(judged: Judged, adapter: "JudgedImages") -> Decision:
    """What the gate decides about an adapter that draws these pictures."""
    from bestiary.evaluation.scoring import compare

    scores = compare(judged.base, adapter, judged.real, judged.train, judged.texts, resamples=500, seed=0)
    return decide(scores, RULES, None)


def test_an_adapter_that_draws_the_animals_passes_the_gate(judged: Judged) -> None:
    assert decision_on(judged, judged.drawn).alias == CHAMPION


def test_an_adapter_that_learned_shuffled_captions_draws_well_and_fails_the_gate(judged: Judged) -> None:
    drawn = judged.drawn
    wrong = type(drawn)(np.roll(drawn.features, 8, axis=0), drawn.labels)  # each animal under the next one's name
    decision, reasons = decision_on(judged, wrong)
    assert decision == CHALLENGER
    assert len(reasons) == 1
    assert reasons[0].startswith("The adapter does not reliably beat the base: margin over other subjects -")


def test_an_adapter_that_draws_its_training_images_beats_the_base_and_fails_the_gate(judged: Judged) -> None:
    decision, reasons = decision_on(judged, judged.train)
    assert decision == CHALLENGER
    assert reasons == [
        "The adapter copies its training images: 100% of its pictures look copied (95 % interval 100% to 100%), and "
        "the limit is 10%."
    ]
