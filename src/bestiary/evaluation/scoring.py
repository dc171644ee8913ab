"""What the judge's features say of generated pictures: scores with intervals, paired between base and adapter.

Letters: N pictures, M reference pictures, K classes, P templates, D features, R resamples. Features are unit vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lgamma
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from bestiary.errors import BestiaryError

Array = NDArray[np.float64]
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # the kernel's width and the scale of arXiv 2401.09603
SCORES = ("clip_score", "margin", "top1", "top5")  # the scores that every single picture has
ROWS = ("base", "adapter", "delta", "real", "floor")


@dataclass(frozen=True)
class Estimate:
    """A number, and the same number on R bootstrap resamples. Two made from the same resamples differ in pairs."""

    mean: float
    resampled: Array  # (R,)

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.mean - other.mean, self.resampled - other.resampled)

    @property
    def ci95(self) -> tuple[float, float]:
        """The percentile interval (Efron 1979)."""
        low, high = np.quantile(self.resampled, [0.025, 0.975])
        return float(low), float(high)

    def report(self) -> dict[str, Any]:
        return {"mean": self.mean, "ci95": list(self.ci95)}


@dataclass(frozen=True)
class Pictures:
    """Features (N, D) of pictures and the class index (N,) that each is meant to show."""

    features: Array
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Words:
    """The classes as the judge reads them.

    prompts (K, D) are what the pictures were drawn from, templates the captions (K, D) in each of P templates.
    """

    classes: Sequence[str]
    prompts: Array
    templates: Mapping[str, Array]

    @property
    def ensemble(self) -> Array:
        """One unit vector (K, D) a class: the mean over templates (arXiv 2103.00020, section 3.1.4)."""
        mean: Array = np.mean(list(self.templates.values()), axis=0)
        return unit(mean)


def unit(vectors: Array) -> Array:
    """Vectors (..., D) at length 1."""
    lengths: Array = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / lengths


def resample_counts(count: int, resamples: int, seed: int) -> Array:
    """How often each of `count` things was drawn, (1 + R, count): the first row is the things themselves, once each.

    Weighted by these counts, one matrix product gives a statistic on the data and on every resample.
    """
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    flat = (drawn + count * np.arange(resamples)[:, None]).ravel()
    counts = np.bincount(flat, minlength=resamples * count).reshape(resamples, count)
    return np.vstack([np.ones((1, count)), counts])


def bootstrap_mean(values: ArrayLike, counts: Array) -> Estimate:
    """The mean of `values` (N,) with its resamples, from `counts` (1 + R, N)."""
    return _estimate(counts @ np.asarray(values, dtype=np.float64) / counts.sum(axis=1))


def bootstrap_cmmd(features: Array, reference: Array, counts: Array, reference_counts: Array) -> Estimate:
    """CMMD of `features` (N, D) against `reference` (M, D), both resampled; copies of one picture are no pair."""
    within = _pair_mean(counts, _kernel(features, features), _others(len(features)))
    within_reference = _pair_mean(reference_counts, _kernel(reference, reference), _others(len(reference)))
    across = ((counts @ _kernel(features, reference)) * reference_counts).sum(axis=1)
    across /= counts.sum(axis=1) * reference_counts.sum(axis=1)
    return _estimate(CMMD_SCALE * (within + within_reference - 2 * across))


def cmmd(features: Array, reference: Array) -> float:
    """Squared maximum mean discrepancy of judge features, unbiased (arXiv 2401.09603): about 0 for equal sources."""
    return bootstrap_cmmd(features, reference, np.ones((1, len(features))), np.ones((1, len(reference)))).mean


def bootstrap_diversity(pictures: Pictures, counts: Array) -> Estimate:
    """100 x (1 - mean cosine) over the pairs of pictures of one class: 0 when all pictures of a class are alike."""
    same_class = (pictures.labels[:, None] == pictures.labels) * _others(len(pictures.labels))
    return _estimate(100 * (1 - _pair_mean(counts, pictures.features @ pictures.features.T, same_class)))


def score(pictures: Pictures, words: Words) -> pd.DataFrame:
    """One row a picture: clip_score (100 x cosine with its prompt), margin (clip_score less the mean over the prompts
    of the other classes), top1, top5 (0 or 100), predicted (class index)."""
    meant = np.arange(len(pictures.labels)), pictures.labels
    similarity = pictures.features @ words.ensemble.T  # (N, K)
    cosines = 100 * pictures.features @ words.prompts.T
    others = (cosines.sum(axis=1) - cosines[meant]) / (len(words.classes) - 1)
    rank = (similarity > similarity[meant][:, None]).sum(axis=1)
    return pd.DataFrame(
        {
            "clip_score": cosines[meant],
            "margin": cosines[meant] - others,
            "top1": np.where(rank < 1, 100.0, 0.0),
            "top5": np.where(rank < 5, 100.0, 0.0),
            "predicted": similarity.argmax(axis=1),
        }
    )


def shuffled(pictures: Pictures, classes: int) -> Pictures:
    """The same pictures, each under the name of another class, every other class equally often."""
    shift = 1 + np.arange(len(pictures.labels)) % (classes - 1)
    return Pictures(pictures.features, (pictures.labels + shift) % classes)


def nearest(features: Array, reference: Array, size: int | None = None) -> Array:
    """Cosine (N,) of each picture with its nearest among `reference` (M, D).

    With `size`, the expected nearest among that many random pictures of the reference, so that a large set and a
    small one compare fairly.
    """
    similarity: Array = features @ reference.T  # (N, M)
    if size is None or size >= len(reference):
        largest: Array = similarity.max(axis=1)
        return largest
    similarity.sort(axis=1)  # in place: among millions a copy is dear
    # The k-th smallest of M is the largest of a random subset of `size` with chance C(k - 1, size - 1) / C(M, size).
    total = len(reference)
    chance = [
        np.exp(_log_choose(k - 1, size - 1) - _log_choose(total, size)) if k >= size else 0.0
        for k in range(1, total + 1)
    ]
    expected: Array = similarity @ np.array(chance)
    return expected


def compare(
    base: Pictures,
    adapter: Pictures,
    real: Pictures,
    train_features: Array,
    words: Words,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The report of base against adapter (the same prompts and noise, row by row), real pictures beside them.

    Raises BestiaryError when there is nothing to compare.
    """
    _check(base, adapter, real, train_features, words)
    counts = resample_counts(len(base.labels), resamples, seed)
    real_counts = resample_counts(len(real.labels), resamples, seed + 1)
    train_counts = resample_counts(len(train_features), resamples, seed + 2)
    drawn = {"base": base, "adapter": adapter}

    rows: dict[str, dict[str, Estimate]] = {}
    for name, pictures in drawn.items():
        rows[name] = _means(score(pictures, words), counts)
        rows[name]["cmmd"] = bootstrap_cmmd(pictures.features, real.features, counts, real_counts)
        rows[name]["diversity"] = bootstrap_diversity(pictures, counts)
    rows["delta"] = {key: rows["adapter"][key] - rows["base"][key] for key in rows["base"]}
    rows["real"] = _means(score(real, words), real_counts)
    # Real against real: what is left of CMMD between two samples of the same source.
    rows["real"]["cmmd"] = bootstrap_cmmd(real.features, train_features, real_counts, train_counts)
    rows["real"]["diversity"] = bootstrap_diversity(real, real_counts)
    rows["floor"] = _means(score(shuffled(adapter, len(words.classes)), words), counts)

    report: dict[str, Any] = {"images": len(base.labels)}
    report |= {name: {key: estimate.report() for key, estimate in row.items()} for name, row in rows.items()}
    report["per_template"] = {
        template: {
            name: bootstrap_mean(_matching(pictures, vectors), counts).report() for name, pictures in drawn.items()
        }
        for template, vectors in words.templates.items()
    }
    report["per_class"] = per_class(base, adapter, words, resamples=resamples, seed=seed)
    report["worst_classes"] = worst_classes(report["per_class"])[:5]
    report["memorisation"] = {
        name: _memorisation(pictures, train_features, real.features, counts, resamples, seed)
        for name, pictures in drawn.items()
    }
    return report


def per_class(
    base: Pictures, adapter: Pictures, words: Words, *, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """For each class the mean scores of base and adapter and their paired difference with its interval."""
    scored = {"base": score(base, words), "adapter": score(adapter, words)}
    table = {}
    for index in np.unique(adapter.labels):
        mine = adapter.labels == index
        counts = resample_counts(int(mine.sum()), resamples, seed)
        means = {row: _means(scores[mine], counts) for row, scores in scored.items()}
        table[words.classes[index]] = {
            **{row: {key: estimate.mean for key, estimate in values.items()} for row, values in means.items()},
            "delta": {key: (means["adapter"][key] - means["base"][key]).report() for key in SCORES},
        }
    return table


def worst_classes(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The classes of `per_class`, the ones that the adapter draws worst first."""
    return sorted(table, key=lambda name: (table[name]["adapter"]["top1"], table[name]["adapter"]["clip_score"]))


def confusion(pictures: Pictures, words: Words) -> pd.DataFrame:
    """How many pictures of each class that was drawn (rows) the judge takes for each class (columns)."""
    predicted = score(pictures, words)["predicted"]
    counts = np.zeros((len(words.classes), len(words.classes)), dtype=int)
    np.add.at(counts, (pictures.labels, predicted), 1)
    drawn = np.unique(pictures.labels)
    return pd.DataFrame(counts[drawn], index=[words.classes[index] for index in drawn], columns=list(words.classes))


def class_table(table: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """`per_class` flat, a row a class, the worst first."""
    rows = []
    for name in worst_classes(table):
        row: dict[str, Any] = {"class": name}
        for key in SCORES:
            delta = table[name]["delta"][key]
            row |= {f"base_{key}": table[name]["base"][key], f"adapter_{key}": table[name]["adapter"][key]}
            row |= {f"delta_{key}": delta["mean"], f"delta_{key}_low": delta["ci95"][0]}
            row[f"delta_{key}_high"] = delta["ci95"][1]
        rows.append(row)
    return pd.DataFrame(rows)


def picture_table(
    base: Pictures, adapter: Pictures, words: Words, prompts: Sequence[str], seeds: Sequence[int]
) -> pd.DataFrame:
    """One row a pair of pictures: what was asked for, the seed that draws it again, what the judge says of both."""
    names = np.array(words.classes)
    columns: dict[str, Any] = {"class": names[base.labels], "prompt": list(prompts), "seed": list(seeds)}
    for row, pictures in (("base", base), ("adapter", adapter)):
        scores = score(pictures, words)
        columns[f"{row}_clip_score"] = scores["clip_score"].round(4)
        columns[f"{row}_margin"] = scores["margin"].round(4)
        columns[f"{row}_predicted"] = names[scores["predicted"]]
    return pd.DataFrame(columns)


def closest_pairs(features: Array, reference: Array, count: int) -> list[tuple[int, int, float]]:
    """(row of the picture, row of its nearest reference picture, cosine) of the `count` closest, the closest first."""
    similarity = features @ reference.T
    closest = np.argsort(-similarity.max(axis=1), kind="stable")[:count]
    nearest_of = similarity.argmax(axis=1)
    return [(int(row), int(nearest_of[row]), float(similarity[row, nearest_of[row]])) for row in closest]


def _memorisation(
    pictures: Pictures, train: Array, validation: Array, counts: Array, resamples: int, seed: int
) -> dict[str, Any]:
    """Cosine with the nearest training and validation picture; their gap, at equal sizes, is 0 if nothing is copied.

    `copied` is after the idea of arXiv 2004.05675.
    """
    size = min(len(train), len(validation))
    fair_train, fair_validation = (nearest(pictures.features, reference, size) for reference in (train, validation))
    values = {
        "nearest_train": nearest(pictures.features, train),
        "nearest_validation": nearest(pictures.features, validation),
        "gap": fair_train - fair_validation,
    }
    report = {key: bootstrap_mean(value, counts).report() for key, value in values.items()}
    return report | {"copied": bootstrap_copied(pictures.features, train, validation, resamples, seed).report()}


def bootstrap_copied(features: Array, train: Array, validation: Array, resamples: int, seed: int) -> Estimate:
    """The share of pictures whose nearest real one was trained on, from 0 (as many as by chance) to 1 (all).

    Many pictures may share one nearest: whether that was trained on or not is one draw of the split and not many, so
    the real pictures are resampled, each with all that are nearest to it.
    """
    nearest_real, pictures = np.unique((features @ np.vstack([train, validation]).T).argmax(axis=1), return_counts=True)
    drawn = resample_counts(len(nearest_real), resamples, seed) * pictures
    share = drawn @ (nearest_real < len(train)) / drawn.sum(axis=1)
    chance = len(train) / (len(train) + len(validation))
    return _estimate((share - chance) / (1.0 - chance))


def _check(base: Pictures, adapter: Pictures, real: Pictures, train_features: Array, words: Words) -> None:
    if len(words.classes) < 2:
        raise BestiaryError("There is one class only: scores compare classes, so at least two are needed.")
    if not len(real.labels):
        raise BestiaryError("There are no validation images to compare with.")
    if not len(base.labels):
        raise BestiaryError("There are no pictures to compare.")
    for name, pictures in (("base", base), ("adapter", adapter), ("validation images", real)):
        without = [words.classes[index] for index in np.unique(base.labels) if index not in pictures.labels]
        if without:
            raise BestiaryError(f"The class {without[0]} has no pictures in the {name}.")
        if not np.isfinite(pictures.features).all():
            raise BestiaryError(f"The judge gives no finite features for pictures of the {name}.")
    if not np.array_equal(base.labels, adapter.labels):
        raise BestiaryError("Base and adapter were not given the same prompts, so they cannot be compared in pairs.")


def _means(scores: pd.DataFrame, counts: Array) -> dict[str, Estimate]:
    return {key: bootstrap_mean(scores[key], counts) for key in SCORES}


def _matching(pictures: Pictures, vectors: Array) -> Array:
    cosines: Array = (pictures.features * vectors[pictures.labels]).sum(axis=1)
    return 100 * cosines


def _estimate(values: Array) -> Estimate:
    return Estimate(float(values[0]), values[1:])


def _pair_mean(counts: Array, values: Array, weights: Array) -> Array:
    """The weighted mean (1 + R,) of `values` (N, N) over the pairs that `counts` (1 + R, N) drew."""
    total: Array = ((counts @ (values * weights)) * counts).sum(axis=1)
    weight: Array = ((counts @ weights) * counts).sum(axis=1)
    # A resample of few pictures may draw no pair at all: it then says what the pictures themselves say.
    return np.divide(total, weight, out=np.full_like(total, total[0] / weight[0]), where=weight > 0)


def _others(count: int) -> Array:
    """1 for each pair of different pictures, 0 for a picture with itself."""
    return 1 - np.eye(count)


def _kernel(left: Array, right: Array) -> Array:
    squared: Array = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
    kernel: Array = np.exp(-squared / (2 * CMMD_SIGMA**2))
    return kernel


def _log_choose(total: int, size: int) -> float:
    return lgamma(total + 1) - lgamma(size + 1) - lgamma(total - size + 1)
