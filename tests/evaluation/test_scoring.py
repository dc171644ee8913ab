import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from bestiary.errors import BestiaryError
from bestiary.evaluation.scoring import (
    Array,
    Pictures,
    Words,
    bootstrap_cmmd,
    bootstrap_copied,
    bootstrap_diversity,
    bootstrap_mean,
    class_table,
    closest_pairs,
    cmmd,
    compare,
    confusion,
    nearest,
    picture_table,
    resample_counts,
    score,
    shuffled,
    unit,
)

CLASSES, DIMENSIONS = 6, 32


def vectors(count: int, seed: int, dimensions: int = DIMENSIONS) -> Array:
    return unit(np.random.default_rng(seed).normal(size=(count, dimensions)))


@pytest.fixture(scope="module")
def words() -> Words:
    prompts = vectors(CLASSES, seed=0)
    templates = {f"template {index}": unit(prompts + 0.05 * vectors(CLASSES, seed=index)) for index in (1, 2, 3)}
    return Words([f"animal{index}" for index in range(CLASSES)], prompts, templates)


def around(words: Words, per_class: int, noise: float, seed: int) -> Pictures:
    """Features near those of the words: the less noise, the better the pictures."""
    labels = np.repeat(np.arange(CLASSES), per_class)
    return Pictures(unit(words.prompts[labels] + noise * vectors(len(labels), seed)), labels)


def report_of(words: Words, base: Pictures, adapter: Pictures, train: Array | None = None) -> dict:
    real = around(words, 5, 0.3, seed=40)
    train = around(words, 20, 0.3, seed=41).features if train is None else train
    return compare(base, adapter, real, train, words, resamples=500, seed=0)


def test_the_bootstrap_of_a_mean_agrees_with_scipys() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=80)
    ours = bootstrap_mean(values, resample_counts(80, 10_000, seed=7))
    scipys = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean(), abs=1e-6)
    assert ours.ci95 == pytest.approx((scipys.low, scipys.high), abs=1e-6)


def test_the_bootstrap_of_a_paired_difference_agrees_with_scipys() -> None:
    base, adapter = np.random.default_rng(2).normal(size=(2, 80))
    counts = resample_counts(80, 10_000, seed=8)
    ours = bootstrap_mean(adapter, counts) - bootstrap_mean(base, counts)
    scipys = stats.bootstrap(
        (adapter, base),
        lambda a, b, axis: np.mean(a, axis=axis) - np.mean(b, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(8),
    ).confidence_interval
    assert ours.ci95 == pytest.approx((scipys.low, scipys.high), abs=1e-6)


@pytest.mark.parametrize("kind", ["normal", "top1"])
def test_intervals_of_paired_differences_cover_the_truth_as_often_as_they_claim(kind: str) -> None:
    random = np.random.default_rng(3)
    trials, pictures = 600, 120
    covered = 0
    for trial in range(trials):
        shared = random.normal(size=pictures)  # the noise that both draw from
        base, adapter = (shared + random.normal(size=pictures) for _ in range(2))
        if kind == "top1":
            base, adapter = 100.0 * (base > 0.5), 100.0 * (adapter > 0.5)
        counts = resample_counts(pictures, 1000, seed=trial)
        low, high = (bootstrap_mean(adapter, counts) - bootstrap_mean(base, counts)).ci95
        covered += low <= 0.0 <= high
    # Three standard errors of a binomial share about 95 %.
    assert covered / trials == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / trials) ** 0.5)


def test_a_pair_of_scores_that_share_their_noise_differs_more_surely_than_two_scores_apart() -> None:
    base = np.random.default_rng(4).normal(size=200)
    counts, other_counts = resample_counts(200, 2000, seed=1), resample_counts(200, 2000, seed=2)
    paired = (bootstrap_mean(base + 0.1, counts) - bootstrap_mean(base, counts)).ci95
    apart = (bootstrap_mean(base + 0.1, counts) - bootstrap_mean(base, other_counts)).ci95
    assert paired == pytest.approx((0.1, 0.1))
    assert apart[0] < 0 < apart[1]


def test_cmmd_agrees_with_a_plain_float64_reference() -> None:
    x, y = vectors(17, seed=5), vectors(23, seed=6)

    def kernel(a: Array, b: Array) -> float:
        return float(np.exp(-((a - b) ** 2).sum() / (2 * 10.0**2)))

    within_x = np.mean([kernel(x[i], x[j]) for i in range(17) for j in range(17) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(23) for j in range(23) if i != j])
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert cmmd(x, y) == pytest.approx(1000 * (within_x + within_y - 2 * across), abs=1e-6)


def test_cmmd_is_unbiased_zero_on_average_between_samples_of_one_source() -> None:
    values = [cmmd(vectors(12, seed=100 + trial), vectors(15, seed=900 + trial)) for trial in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_a_resample_of_cmmd_is_cmmd_of_the_resampled_pictures_without_copies_as_pairs() -> None:
    x, y = vectors(6, seed=7), vectors(5, seed=8)
    drawn = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])  # as if five of six were there
    counts = np.vstack([np.ones(6), drawn])
    resampled = bootstrap_cmmd(x, y, counts, np.ones((2, 5))).resampled[0]
    assert resampled == pytest.approx(cmmd(x[drawn > 0], y))


def test_intervals_of_cmmd_cover_the_truth_at_least_as_often_as_they_claim() -> None:
    def sample(count: int, random: np.random.Generator, shift: float) -> Array:
        values = random.normal(size=(count, 8))
        values[:, 0] += shift
        return unit(values)

    random = np.random.default_rng(99)
    truth = np.mean([cmmd(sample(600, random, 1.5), sample(600, random, 0.0)) for _ in range(6)])
    trials, covered = 250, 0
    for trial in range(trials):
        random = np.random.default_rng(trial)
        pictures, reference = sample(60, random, 1.5), sample(50, random, 0.0)
        counts = resample_counts(60, 300, seed=2 * trial), resample_counts(50, 300, seed=2 * trial + 1)
        low, high = bootstrap_cmmd(pictures, reference, *counts).ci95
        covered += low <= truth <= high
    assert covered / trials > 0.95 - 3 * (0.95 * 0.05 / trials) ** 0.5


def test_pictures_equal_to_their_prompts_score_full_marks(words: Words) -> None:
    scores = score(Pictures(words.prompts, np.arange(CLASSES)), words)
    assert scores["clip_score"].to_numpy() == pytest.approx(100)
    assert (scores["top1"] == 100).all()
    assert (scores["predicted"] == np.arange(CLASSES)).all()


def test_a_style_that_every_prompt_likes_lifts_the_clip_score_and_not_the_margin(words: Words) -> None:
    pictures = around(words, 5, 1.0, seed=30)
    styled = Pictures(pictures.features + 0.2 * np.linalg.pinv(words.prompts) @ np.ones(CLASSES), pictures.labels)
    before, after = score(pictures, words), score(styled, words)
    assert (after["clip_score"] - before["clip_score"]).to_numpy() == pytest.approx(20)
    assert (after["margin"] - before["margin"]).to_numpy() == pytest.approx(0, abs=1e-9)


def test_top5_forgives_four_better_classes_and_not_five(words: Words) -> None:
    similarity = words.prompts @ words.ensemble.T
    ranks = np.argsort(np.argsort(-similarity, axis=1), axis=1)  # of each class for each class's prompt
    labels = np.arange(CLASSES)
    for shift in range(CLASSES):
        asked = (labels + shift) % CLASSES
        scores = score(Pictures(words.prompts, asked), words)
        assert (scores["top5"].to_numpy() == 100.0 * (ranks[labels, asked] < 5)).all()


def test_the_floor_gives_no_picture_its_own_name_and_every_other_class_equally_often() -> None:
    pictures = Pictures(vectors(60, seed=9), np.repeat(np.arange(CLASSES), 10))
    labels = shuffled(pictures, CLASSES).labels
    table = np.zeros((CLASSES, CLASSES), dtype=int)
    np.add.at(table, (pictures.labels, labels), 1)
    assert (np.diag(table) == 0).all()
    assert set(table[~np.eye(CLASSES, dtype=bool)]) == {2}


def test_diversity_is_zero_for_one_picture_repeated_and_the_mean_distance_otherwise() -> None:
    labels = np.repeat(np.arange(2), 3)
    once = Pictures(np.repeat(vectors(2, seed=10), 3, axis=0), labels)
    assert bootstrap_diversity(once, np.ones((1, 6))).mean == pytest.approx(0, abs=1e-9)
    features = vectors(6, seed=11)
    pairs = [1 - features[i] @ features[j] for first in (0, 3) for i, j in combinations(range(first, first + 3), 2)]
    assert bootstrap_diversity(Pictures(features, labels), np.ones((1, 6))).mean == pytest.approx(100 * np.mean(pairs))


def test_resamples_of_very_few_pictures_stay_finite() -> None:
    pictures = Pictures(vectors(4, seed=12), np.array([0, 0, 1, 1]))
    assert np.isfinite(bootstrap_diversity(pictures, resample_counts(4, 2000, seed=0)).resampled).all()


def test_the_fair_nearest_is_the_mean_over_all_subsets_of_that_size() -> None:
    features, reference = vectors(3, seed=13), vectors(7, seed=14)
    subsets = [(features @ reference[list(chosen)].T).max(axis=1) for chosen in combinations(range(7), 3)]
    assert nearest(features, reference, size=3) == pytest.approx(np.mean(subsets, axis=0))
    assert nearest(features, reference) == pytest.approx((features @ reference.T).max(axis=1))


def test_a_copied_training_image_is_the_closest_pair(words: Words) -> None:
    train = around(words, 20, 0.3, seed=15).features
    features = around(words, 4, 0.3, seed=16).features
    features[9] = train[33]
    assert closest_pairs(features, train, 3)[0] == (9, 33, pytest.approx(1.0))


def test_memorisation_shows_in_an_adapter_that_copies_and_not_in_one_that_learned(words: Words) -> None:
    train = around(words, 20, 0.6, seed=17).features
    learned = around(words, 20, 0.6, seed=18)
    copies = Pictures(unit(train + 0.05 * vectors(len(train), seed=19)), learned.labels)
    real = around(words, 20, 0.6, seed=20)
    report = compare(learned, copies, real, train, words, resamples=500, seed=0)["memorisation"]
    low, high = report["base"]["gap"]["ci95"]
    assert low < 0 < high
    assert report["adapter"]["gap"]["ci95"][0] > 0.05
    low, high = report["base"]["copied"]["ci95"]
    assert low < 0 < high
    assert report["adapter"]["copied"]["mean"] > 0.9


def test_the_interval_of_copied_knows_that_pictures_share_their_nearest_image() -> None:
    """A narrow model that copies nothing: its pictures crowd around few real ones, so each of those counts for many."""
    random = np.random.default_rng(0)
    missed = 0
    for number in range(60):
        centres = np.repeat(random.normal(size=(16, 32)), 41, axis=0)
        real = random.permutation(unit(centres + 0.3 * random.normal(size=centres.shape)))
        drawn = unit(np.repeat(centres[::41], 24, axis=0) + 0.15 * random.normal(size=(384, 32)))
        low, high = bootstrap_copied(drawn, real[:526], real[526:], resamples=500, seed=number).ci95
        missed += not low <= 0 <= high
    assert missed <= 9  # 3 of 60 are expected; as if pictures were independent it would be 25


def test_a_better_adapter_wins_in_every_score_with_intervals_that_exclude_zero(words: Words) -> None:
    report = report_of(words, around(words, 15, 3.0, seed=21), around(words, 15, 0.4, seed=22))
    assert report["delta"]["clip_score"]["ci95"][0] > 0
    assert report["delta"]["top1"]["ci95"][0] > 0
    assert report["delta"]["cmmd"]["ci95"][1] < 0
    assert report["floor"]["top1"]["mean"] < report["base"]["top1"]["mean"] < report["adapter"]["top1"]["mean"]


def test_an_adapter_that_changes_nothing_differs_by_exactly_zero(words: Words) -> None:
    base = around(words, 10, 0.8, seed=23)
    for delta in report_of(words, base, base)["delta"].values():
        assert delta == {"mean": 0.0, "ci95": [0.0, 0.0]}


def test_the_report_holds_every_row_and_only_finite_numbers(words: Words) -> None:
    report = report_of(words, around(words, 2, 1.0, seed=24), around(words, 2, 0.5, seed=25))
    json.dumps(report, allow_nan=False)
    assert report["images"] == 2 * CLASSES
    for row in ("base", "adapter", "real", "delta"):
        assert set(report[row]) == {"clip_score", "margin", "top1", "top5", "cmmd", "diversity"}
    assert list(report["per_class"]) == list(words.classes)
    assert len(report["worst_classes"]) == 5
    assert set(report["per_template"]) == set(words.templates)


def test_the_tables_agree_with_the_report(words: Words) -> None:
    base, adapter = around(words, 4, 1.0, seed=26), around(words, 4, 0.5, seed=27)
    report = report_of(words, base, adapter)
    table = class_table(report["per_class"])
    assert table["delta_clip_score"].mean() == pytest.approx(report["delta"]["clip_score"]["mean"])
    assert list(table["class"][:5]) == report["worst_classes"]
    pictures = picture_table(base, adapter, words, ["a photo"] * len(base.labels), range(len(base.labels)))
    assert pictures["adapter_clip_score"].mean() == pytest.approx(report["adapter"]["clip_score"]["mean"], abs=1e-3)
    matrix = confusion(adapter, words)
    assert (matrix.sum(axis=1) == 4).all()
    assert np.trace(matrix) / len(base.labels) * 100 == pytest.approx(report["adapter"]["top1"]["mean"])


def test_what_cannot_be_compared_is_refused_in_one_sentence(words: Words) -> None:
    pictures = around(words, 3, 0.5, seed=28)
    nothing = Pictures(np.empty((0, DIMENSIONS)), np.empty(0, dtype=np.int64))
    not_finite = replace(pictures, features=np.full_like(pictures.features, np.nan))
    train = pictures.features

    def refusal(base: Pictures, adapter: Pictures, real: Pictures, words: Words = words) -> str:
        with pytest.raises(BestiaryError) as caught:
            compare(base, adapter, real, train, words, resamples=10, seed=0)
        return str(caught.value)

    without_first = Pictures(train[3:], pictures.labels[3:])
    assert refusal(pictures, pictures, nothing) == "There are no validation images to compare with."
    assert "animal0 has no pictures in the validation images" in refusal(pictures, pictures, without_first)
    assert "no finite features" in refusal(pictures, not_finite, pictures)
    assert "not given the same prompts" in refusal(pictures, replace(pictures, labels=pictures.labels[::-1]), pictures)
    assert "one class only" in refusal(pictures, pictures, pictures, replace(words, classes=["animal0"]))
