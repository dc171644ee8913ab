import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from bestiary.errors import BestiaryError
from bestiary.evaluation.report import SCORES, Estimate, ScoreReport
from bestiary.evaluation.scoring import (
    Array,
    ClassTexts,
    JudgedImages,
    Resampled,
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
    resample,
    resample_counts,
    score,
    shuffled,
    unit,
)

CLASSES, DIMENSIONS = 6, 32


def vectors(count: int, seed: int, dimensions: int = DIMENSIONS) -> Array:
    return unit(np.random.default_rng(seed).normal(size=(count, dimensions)))


@pytest.fixture(scope="module")
def texts() -> ClassTexts:
    prompts = vectors(CLASSES, seed=0)
    templates = {f"template {index}": unit(prompts + 0.05 * vectors(CLASSES, seed=index)) for index in (1, 2, 3)}
    return ClassTexts([f"animal{index}" for index in range(CLASSES)], prompts, templates)


def around(texts: ClassTexts, per_class: int, noise: float, seed: int) -> JudgedImages:
    """Features around those of the prompts: the less noise, the better the pictures."""
    labels = np.repeat(np.arange(CLASSES), per_class)
    return JudgedImages(unit(texts.prompts[labels] + noise * vectors(len(labels), seed)), labels)


def of_one_class(features: Array) -> JudgedImages:
    return JudgedImages(features, np.zeros(len(features), np.int64))


def report_of(texts: ClassTexts, base: JudgedImages, adapter: JudgedImages) -> ScoreReport:
    real, train = around(texts, 5, 0.3, seed=40), around(texts, 20, 0.3, seed=41)
    return compare(base, adapter, real, train, texts, resamples=500, seed=0)


def test_the_bootstrap_of_a_mean_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=80)
    ours = bootstrap_mean(values, resample_counts(80, 10_000, seed=7))
    scipys = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean(), abs=1e-6)
    assert ours.ci95 == pytest.approx((scipys.low, scipys.high), abs=1e-6)


def test_the_bootstrap_of_a_paired_difference_agrees_with_scipy() -> None:
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
def test_95_percent_intervals_of_paired_differences_contain_the_truth_95_times_in_100(kind: str) -> None:
    random = np.random.default_rng(3)
    trials, pictures = 600, 120
    covered = 0
    for trial in range(trials):
        shared = random.normal(size=pictures)  # the noise that both start from
        base, adapter = (shared + random.normal(size=pictures) for _ in range(2))
        if kind == "top1":
            base, adapter = (np.where(values > 0.5, 100.0, 0.0) for values in (base, adapter))
        counts = resample_counts(pictures, 1000, seed=trial)
        low, high = (bootstrap_mean(adapter, counts) - bootstrap_mean(base, counts)).ci95
        covered += low <= 0.0 <= high
    # Three standard errors of a binomial proportion around 95 %.
    assert covered / trials == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / trials) ** 0.5)


def test_a_paired_difference_has_a_narrower_interval_than_an_unpaired_one() -> None:
    base = np.random.default_rng(4).normal(size=200)
    counts, other_counts = resample_counts(200, 2000, seed=1), resample_counts(200, 2000, seed=2)
    paired = (bootstrap_mean(base + 0.1, counts) - bootstrap_mean(base, counts)).ci95
    unpaired = (bootstrap_mean(base + 0.1, counts) - bootstrap_mean(base, other_counts)).ci95
    assert paired == pytest.approx((0.1, 0.1))
    assert unpaired[0] < 0 < unpaired[1]


def test_cmmd_agrees_with_a_plain_float64_reference() -> None:
    x, y = vectors(17, seed=5), vectors(23, seed=6)

    def kernel(a: Array, b: Array) -> float:
        return float(np.exp(-((a - b) ** 2).sum() / (2 * 10.0**2)))

    within_x = np.mean([kernel(x[i], x[j]) for i in range(17) for j in range(17) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(23) for j in range(23) if i != j])
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert cmmd(x, y) == pytest.approx(1000 * (within_x + within_y - 2 * across), abs=1e-6)


def test_cmmd_between_samples_of_one_source_is_zero_on_average() -> None:
    values = [cmmd(vectors(12, seed=100 + trial), vectors(15, seed=900 + trial)) for trial in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_cmmd_between_samples_with_as_many_of_each_class_is_zero_on_average() -> None:
    centres, labels = np.repeat(np.eye(8)[:4], 5, axis=0), np.repeat(np.arange(4), 5)
    random = np.random.default_rng(1)

    def sample() -> Resampled:
        features = unit(centres + random.normal(0, 0.3, size=centres.shape))
        return resample(JudgedImages(features, labels), resamples=0, seed=0)

    pairs = [(sample(), sample()) for _ in range(400)]
    values = [bootstrap_cmmd(*pair).mean for pair in pairs]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    # Without the classes, pairs of one class are missing, and the CMMD is too low.
    as_one = [cmmd(*(each.images.features for each in pair)) for pair in pairs]
    assert np.mean(as_one) < -10 * np.std(as_one) / np.sqrt(len(as_one))


def test_a_resample_of_cmmd_is_the_cmmd_of_the_resampled_pictures() -> None:
    x, y = vectors(6, seed=7), vectors(5, seed=8)
    drawn = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])  # five of the six pictures
    pictures = Resampled(of_one_class(x), np.vstack([np.ones(6), drawn]))
    reference = Resampled(of_one_class(y), np.ones((2, 5)))
    assert bootstrap_cmmd(pictures, reference).resampled[0] == pytest.approx(cmmd(x[drawn > 0], y))


def test_95_percent_intervals_of_cmmd_contain_the_truth_at_least_95_times_in_100() -> None:
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
        drawn = resample(of_one_class(pictures), 300, seed=2 * trial)
        low, high = bootstrap_cmmd(drawn, resample(of_one_class(reference), 300, seed=2 * trial + 1)).ci95
        covered += bool(low <= truth <= high)
    assert covered / trials > 0.95 - 3 * (0.95 * 0.05 / trials) ** 0.5


def test_resampling_within_classes_narrows_the_interval_of_cmmd_and_still_contains_the_truth() -> None:
    centres = np.eye(8)[:4] * 4

    def sample(each: int, random: np.random.Generator, shift: float) -> Array:
        return unit(np.repeat(centres, each, axis=0) + random.normal(shift, 1, size=(4 * each, 8)))

    random = np.random.default_rng(99)
    truth = np.mean([cmmd(sample(200, random, 0.3), sample(200, random, 0.0)) for _ in range(6)])
    labels = np.repeat(np.arange(4), 12)
    trials, covered, widths = 150, 0, []
    for trial in range(trials):
        random = np.random.default_rng(trial)
        sides = sample(12, random, 0.3), sample(12, random, 0.0)
        (low, high), wide = (
            bootstrap_cmmd(
                *(resample(JudgedImages(side, of), 200, 2 * trial + number) for number, side in enumerate(sides))
            ).ci95
            for of in (labels, np.zeros_like(labels))
        )
        covered += bool(low <= truth <= high)
        widths.append((high - low) / (wide[1] - wide[0]))
    assert covered / trials > 0.95 - 3 * (0.95 * 0.05 / trials) ** 0.5
    assert np.mean(widths) < 0.8


def test_pictures_with_the_features_of_their_prompts_get_the_highest_scores(texts: ClassTexts) -> None:
    scores = score(JudgedImages(texts.prompts, np.arange(CLASSES)), texts)
    assert scores["clip_score"].to_numpy() == pytest.approx(100)
    assert (scores["top1"] == 100).all()
    assert (scores["predicted"] == np.arange(CLASSES)).all()


def test_a_style_that_fits_every_prompt_raises_the_clip_score_but_not_the_margin(texts: ClassTexts) -> None:
    pictures = around(texts, 5, 1.0, seed=30)
    styled = JudgedImages(pictures.features + 0.2 * np.linalg.pinv(texts.prompts) @ np.ones(CLASSES), pictures.labels)
    before, after = score(pictures, texts), score(styled, texts)
    assert (after["clip_score"] - before["clip_score"]).to_numpy() == pytest.approx(20)
    assert (after["margin"] - before["margin"]).to_numpy() == pytest.approx(0, abs=1e-9)


def test_top5_accepts_four_better_classes_but_not_five(texts: ClassTexts) -> None:
    similarity = texts.prompts @ texts.ensemble.T
    ranks = np.argsort(np.argsort(-similarity, axis=1), axis=1)  # of each class for each class's prompt
    labels = np.arange(CLASSES)
    for shift in range(CLASSES):
        shown = (labels + shift) % CLASSES
        scores = score(JudgedImages(texts.prompts, shown), texts)
        assert (scores["top5"].to_numpy() == 100.0 * (ranks[labels, shown] < 5)).all()


def test_the_floor_labels_pictures_with_every_other_class_equally_often_and_never_with_their_own() -> None:
    pictures = JudgedImages(vectors(60, seed=9), np.repeat(np.arange(CLASSES), 10))
    labels = shuffled(pictures, CLASSES).labels
    table = np.zeros((CLASSES, CLASSES), dtype=int)
    np.add.at(table, (pictures.labels, labels), 1)
    assert (np.diag(table) == 0).all()
    assert set(table[~np.eye(CLASSES, dtype=bool)]) == {2}


def test_diversity_is_the_mean_distance_within_a_class_and_zero_for_equal_pictures() -> None:
    labels = np.repeat(np.arange(2), 3)
    once = JudgedImages(np.repeat(vectors(2, seed=10), 3, axis=0), labels)
    assert bootstrap_diversity(resample(once, 0, seed=0)).mean == pytest.approx(0, abs=1e-9)
    features = vectors(6, seed=11)
    pairs = [1 - features[i] @ features[j] for first in (0, 3) for i, j in combinations(range(first, first + 3), 2)]
    drawn = resample(JudgedImages(features, labels), 0, seed=0)
    assert bootstrap_diversity(drawn).mean == pytest.approx(100 * np.mean(pairs))


def test_resamples_of_very_few_pictures_are_finite() -> None:
    pictures = JudgedImages(vectors(4, seed=12), np.array([0, 0, 1, 1]))
    assert np.isfinite(bootstrap_diversity(resample(pictures, 2000, seed=0)).resampled).all()


def test_the_nearest_of_a_random_subset_is_the_mean_over_all_subsets_of_that_size() -> None:
    features, reference = vectors(3, seed=13), vectors(7, seed=14)
    subsets = [(features @ reference[list(chosen)].T).max(axis=1) for chosen in combinations(range(7), 3)]
    assert nearest(features, reference, size=3) == pytest.approx(np.mean(subsets, axis=0))
    assert nearest(features, reference) == pytest.approx((features @ reference.T).max(axis=1))


def test_a_copied_training_image_is_the_closest_pair(texts: ClassTexts) -> None:
    train = around(texts, 20, 0.3, seed=15).features
    features = around(texts, 4, 0.3, seed=16).features
    features[9] = train[33]
    closest = closest_pairs(features, train, 3)[0]
    assert (closest.picture, closest.reference) == (9, 33)
    assert closest.cosine == pytest.approx(1.0)


def test_memorisation_is_found_in_an_adapter_that_copies_but_not_in_one_that_learned(texts: ClassTexts) -> None:
    train = around(texts, 20, 0.6, seed=17)
    learned = around(texts, 20, 0.6, seed=18)
    copies = JudgedImages(unit(train.features + 0.05 * vectors(len(train.labels), seed=19)), learned.labels)
    real = around(texts, 20, 0.6, seed=20)
    memorisation = compare(learned, copies, real, train, texts, resamples=500, seed=0).memorisation
    low, high = memorisation.base.gap.ci95
    assert low < 0 < high
    assert memorisation.adapter.gap.ci95[0] > 0.05
    low, high = memorisation.base.copied.ci95
    assert low < 0 < high
    assert memorisation.adapter.copied.mean > 0.9


def test_the_interval_of_copied_accounts_for_pictures_with_the_same_nearest_image() -> None:
    """A model without variety that copies nothing: many of its pictures have the same nearest real image."""
    random = np.random.default_rng(0)
    missed = 0
    for number in range(60):
        centres = np.repeat(random.normal(size=(16, 32)), 41, axis=0)
        real = random.permutation(unit(centres + 0.3 * random.normal(size=centres.shape)))
        drawn = unit(np.repeat(centres[::41], 24, axis=0) + 0.15 * random.normal(size=(384, 32)))
        low, high = bootstrap_copied(drawn, real[:526], real[526:], resamples=500, seed=number).ci95
        missed += not low <= 0 <= high
    assert missed <= 9  # 3 of 60 are expected; a bootstrap over the pictures misses 25


def test_a_better_adapter_wins_every_score_with_an_interval_that_excludes_zero(texts: ClassTexts) -> None:
    report = report_of(texts, around(texts, 15, 3.0, seed=21), around(texts, 15, 0.4, seed=22))
    assert report.delta["clip_score"].ci95[0] > 0
    assert report.delta["top1"].ci95[0] > 0
    assert report.delta["cmmd"].ci95[1] < 0
    assert report.floor["top1"].mean < report.base["top1"].mean < report.adapter["top1"].mean


def test_an_adapter_that_changes_nothing_differs_by_exactly_zero(texts: ClassTexts) -> None:
    base = around(texts, 10, 0.8, seed=23)
    for delta in report_of(texts, base, base).delta.values():
        assert delta == Estimate(mean=0.0, ci95=(0.0, 0.0))


def test_the_report_holds_every_row_and_only_finite_numbers(texts: ClassTexts) -> None:
    report = report_of(texts, around(texts, 2, 1.0, seed=24), around(texts, 2, 0.5, seed=25))
    json.dumps(report.model_dump(), allow_nan=False)
    assert report.images == 2 * CLASSES
    for row in (report.base, report.adapter, report.real, report.delta):
        assert list(row) == [score.key for score in SCORES if score.key not in ("fidelity", "prompt_following")]
    assert list(report.floor) == ["clip_score", "margin", "top1", "top5"]
    assert list(report.per_class) == list(texts.classes)
    assert len(report.worst_classes) == 5
    assert set(report.per_template) == set(texts.templates)


def test_the_tables_agree_with_the_report(texts: ClassTexts) -> None:
    base, adapter = around(texts, 4, 1.0, seed=26), around(texts, 4, 0.5, seed=27)
    report = report_of(texts, base, adapter)
    table = class_table(report.per_class)
    assert table["delta_clip_score"].mean() == pytest.approx(report.delta["clip_score"].mean)
    assert tuple(table["class"][:5]) == report.worst_classes
    pictures = picture_table(base, adapter, texts, ["a photo"] * len(base.labels), range(len(base.labels)))
    assert pictures["adapter_clip_score"].mean() == pytest.approx(report.adapter["clip_score"].mean, abs=1e-3)
    matrix = confusion(adapter, texts)
    assert (matrix.sum(axis=1) == 4).all()
    assert np.trace(matrix) / len(base.labels) * 100 == pytest.approx(report.adapter["top1"].mean)


def test_one_class_has_no_scores_that_take_several(texts: ClassTexts) -> None:
    alone = ClassTexts(["cat"], texts.prompts[:1], {name: rows[:1] for name, rows in texts.templates.items()})
    pictures = around(texts, 4, 0.5, seed=30)
    cats = JudgedImages(pictures.features[:4], pictures.labels[:4])
    report = compare(cats, cats, cats, cats, alone, resamples=10, seed=0)
    assert list(report.delta) == ["clip_score", "cmmd", "diversity"]
    assert report.floor == {}
    assert list(report.per_class["cat"].delta) == ["clip_score"]
    assert report.worst_classes == ("cat",)
    table = picture_table(cats, cats, alone, ["a photo"] * 4, range(4))
    assert "adapter_margin" not in table
    assert class_table(report.per_class)["delta_clip_score"].tolist() == [0.0]


def test_one_validation_image_has_no_scores_that_need_pairs(texts: ClassTexts) -> None:
    """As with four photos of one subject, of which the split may hold out a single one."""
    alone = ClassTexts(["cat"], texts.prompts[:1], {name: rows[:1] for name, rows in texts.templates.items()})
    pictures = around(texts, 5, 0.5, seed=31)
    cats, held_out = (JudgedImages(pictures.features[at], pictures.labels[at]) for at in (slice(4), slice(4, 5)))
    report = compare(cats, cats, held_out, cats, alone, resamples=10, seed=0)
    assert list(report.delta) == ["clip_score", "diversity"]
    assert list(report.real) == ["clip_score"]
    assert all(math.isfinite(row.mean) for row in (*report.adapter.values(), *report.real.values()))


def test_pictures_that_cannot_be_compared_are_refused_with_the_reason(texts: ClassTexts) -> None:
    pictures = around(texts, 3, 0.5, seed=28)
    nothing = JudgedImages(np.empty((0, DIMENSIONS)), np.empty(0, dtype=np.int64))
    not_finite = replace(pictures, features=np.full_like(pictures.features, np.nan))

    def refusal(base: JudgedImages, adapter: JudgedImages, real: JudgedImages, texts: ClassTexts = texts) -> str:
        with pytest.raises(BestiaryError) as caught:
            compare(base, adapter, real, pictures, texts, resamples=10, seed=0)
        return str(caught.value)

    without_first = JudgedImages(pictures.features[3:], pictures.labels[3:])
    assert "split.val_fraction" in refusal(pictures, pictures, nothing)
    assert "evaluate.classes" in refusal(nothing, nothing, pictures)
    message = refusal(pictures, pictures, without_first)
    assert "animal0" in message
    assert "validation" in message
    message = refusal(pictures, not_finite, pictures)
    assert "adapter" in message
    assert "not finite" in message
    assert "in pairs" in refusal(pictures, replace(pictures, labels=pictures.labels[::-1]), pictures)
