"""Score pictures by the judge's features, with bootstrap intervals; differences are paired between base and adapter.

Letters: N pictures, M reference images, K classes, P templates, D features, R resamples. Features are unit vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lgamma
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from bestiary.errors import BestiaryError
from bestiary.evaluation.report import (
    PER_PICTURE,
    ClassScores,
    Estimate,
    Memorisation,
    MemorisationRows,
    ScoreReport,
    TemplateScores,
)

Array = NDArray[np.float64]
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # the kernel's width and the scale of arXiv:2401.09603


@dataclass(frozen=True)
class Bootstrap:
    """A statistic, and the same statistic on R bootstrap resamples.

    Subtract two that were computed from the same resamples to get a paired difference.
    """

    mean: float
    resampled: Array  # (R,)

    def __sub__(self, other: Bootstrap) -> Bootstrap:
        return Bootstrap(self.mean - other.mean, self.resampled - other.resampled)

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95 % percentile interval (Efron 1979)."""
        low, high = np.quantile(self.resampled, [0.025, 0.975])
        return float(low), float(high)

    def estimate(self) -> Estimate:
        """The statistic and its interval, without the resamples."""
        return Estimate(mean=self.mean, ci95=self.ci95)


@dataclass(frozen=True)
class JudgedImages:
    """The judge's features (N, D) of images, and the index (N,) of the class that each image should show."""

    features: Array
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Resampled:
    """Images with their bootstrap resamples: `counts` (1 + R, N), as `resample_counts_by_class` returns them."""

    images: JudgedImages
    counts: Array

    @cached_property
    def similarity(self) -> Array:
        """The mean (1 + R,) of CMMD's kernel over the pairs of images. Copies of one image are no pair."""
        features, labels = self.images.features, self.images.labels
        return _mean_within(self.counts, _kernel(features, features), strata(labels))


@dataclass(frozen=True)
class ClassTexts:
    """The judge's features of the texts that describe each class.

    prompts (K, D) are what the pictures were drawn from; templates hold the captions (K, D) in each of P templates.
    """

    classes: Sequence[str]
    prompts: Array
    templates: Mapping[str, Array]

    @property
    def ensemble(self) -> Array:
        """One unit vector for each class (K, D): the mean over the templates (arXiv:2103.00020, section 3.1.4)."""
        mean: Array = np.mean(list(self.templates.values()), axis=0)
        return unit(mean)


class ClosestPair(NamedTuple):
    """A picture (by row), its nearest reference image (by row), and their cosine."""

    picture: int
    reference: int
    cosine: float


def unit(vectors: Array) -> Array:
    """Scale vectors (..., D) to length 1.

    >>> unit(np.array([[3.0, 4.0]]))
    array([[0.6, 0.8]])
    """
    lengths: Array = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / lengths


def resample_counts(count: int, resamples: int, seed: int) -> Array:
    """How often each resample contains each of `count` items: (1 + R, count). The first row is the data itself.

    A statistic that is weighted by these counts needs one matrix product for the data and all resamples.

    >>> resample_counts(3, resamples=2, seed=0)
    array([[1., 1., 1.],
           [0., 2., 1.],
           [3., 0., 0.]])
    """
    return _resample(np.random.default_rng(seed), count, resamples)


def strata(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """What to resample pictures within (N,): their classes, or all together when a class has a single picture.

    >>> strata(np.array([2, 1, 2])), strata(np.array([2, 1, 2, 1]))
    (array([0, 0, 0]), array([2, 1, 2, 1]))
    """
    _, sizes = np.unique(labels, return_counts=True)
    return labels if sizes.min(initial=2) > 1 else np.zeros_like(labels)


def resample_counts_by_class(labels: NDArray[np.int64], resamples: int, seed: int) -> Array:
    """As `resample_counts`, for pictures with these labels (N,): each resample has as many of each class as the data.

    The number of pictures of each class is chosen, not drawn (a stratified bootstrap: Davison and Hinkley 1997, section
    3.2). Otherwise a resample with more cats would differ from the real images because of its many cats. When a class
    has a single picture, the pictures are resampled as a whole.

    >>> resample_counts_by_class(np.array([0, 1, 0, 1]), resamples=2, seed=1)
    array([[1., 1., 1., 1.],
           [1., 2., 1., 0.],
           [0., 0., 2., 2.]])
    """
    random, within = np.random.default_rng(seed), strata(labels)
    counts = np.empty((1 + resamples, len(labels)))
    for stratum in np.unique(within):
        chosen = np.flatnonzero(within == stratum)
        counts[:, chosen] = _resample(random, len(chosen), resamples)
    return counts


def resample(images: JudgedImages, resamples: int, seed: int) -> Resampled:
    """The images with their resamples, within their classes."""
    return Resampled(images, resample_counts_by_class(images.labels, resamples, seed))


def _resample(random: np.random.Generator, count: int, resamples: int) -> Array:
    drawn = random.integers(0, count, (resamples, count))
    flat = (drawn + count * np.arange(resamples)[:, None]).ravel()
    counts = np.bincount(flat, minlength=resamples * count).reshape(resamples, count)
    return np.vstack([np.ones((1, count)), counts])


def bootstrap_mean(values: ArrayLike, counts: Array) -> Bootstrap:
    """The mean of `values` (N,) with its resamples, from `counts` (1 + R, N).

    >>> bootstrap_mean([1.0, 2.0, 6.0], resample_counts(3, resamples=1000, seed=0)).ci95
    (1.0, 6.0)
    """
    return _bootstrap(counts @ np.asarray(values, dtype=np.float64) / counts.sum(axis=1))


def bootstrap_cmmd(pictures: Resampled, reference: Resampled) -> Bootstrap:
    """CMMD of the pictures against the reference images, both resampled."""
    across = pictures.counts @ _kernel(pictures.images.features, reference.images.features)
    totals = (across * reference.counts).sum(axis=1)
    totals /= pictures.counts.sum(axis=1) * reference.counts.sum(axis=1)
    return _bootstrap(CMMD_SCALE * (pictures.similarity + reference.similarity - 2 * totals))


def cmmd(features: Array, reference: Array) -> float:
    """Unbiased squared maximum mean discrepancy of features (arXiv:2401.09603): about 0 for samples of one source.

    >>> left, right = (unit(np.random.default_rng(seed).normal(size=(50, 8))) for seed in (0, 1))
    >>> round(cmmd(left, right), 1), round(cmmd(left, unit(right + 1.0)), 1)
    (-0.3, 9.3)
    """
    images = (JudgedImages(each, np.zeros(len(each), np.int64)) for each in (features, reference))
    return bootstrap_cmmd(*(resample(each, resamples=0, seed=0) for each in images)).mean


def bootstrap_diversity(pictures: Resampled) -> Bootstrap:
    """100 x (1 - mean cosine) over the pairs of pictures of one class: 0 if all pictures of a class are equal."""
    labels, features = pictures.images.labels, pictures.images.features
    same_class = (labels[:, None] == labels) * _pairs(len(labels))
    return _bootstrap(100 * (1 - _pair_mean(pictures.counts, features @ features.T, same_class)))


def pair_scores(pictures: Resampled, reference: Resampled) -> dict[str, Bootstrap]:
    """CMMD against the reference, and diversity. Both need pairs: a single image has neither.

    >>> alone = resample(JudgedImages(np.eye(2)[:1], np.array([0])), resamples=0, seed=0)
    >>> pair_scores(alone, alone)
    {}
    """
    labels, scores = pictures.images.labels, {}
    if min(len(labels), len(reference.images.labels)) > 1:
        scores["cmmd"] = bootstrap_cmmd(pictures, reference)
    if len(np.unique(labels)) < len(labels):
        scores["diversity"] = bootstrap_diversity(pictures)
    return scores


def score(images: JudgedImages, texts: ClassTexts) -> pd.DataFrame:
    """The scores of each picture, one row each.

    Columns: clip_score (100 x cosine with its prompt), margin (clip_score minus the mean over the prompts of the other
    classes), top1 and top5 (100 if the class is the judge's first choice, or among its first five, else 0), predicted
    (the index of the judge's first choice). With one class there are no margin, top1 and top5.

    >>> texts = ClassTexts(["bee", "owl"], prompts=np.eye(2), templates={"a photo of {}": np.eye(2)})
    >>> score(JudgedImages(np.eye(2), np.array([0, 0])), texts)
       clip_score  margin   top1   top5  predicted
    0       100.0   100.0  100.0  100.0          0
    1         0.0  -100.0    0.0  100.0          1
    """
    own = np.arange(len(images.labels)), images.labels
    similarity = images.features @ texts.ensemble.T  # (N, K)
    cosines = 100 * images.features @ texts.prompts.T
    scores = {"clip_score": cosines[own]}
    if len(texts.classes) > 1:
        others = (cosines.sum(axis=1) - cosines[own]) / (len(texts.classes) - 1)
        rank = (similarity > similarity[own][:, None]).sum(axis=1)
        scores |= {
            "margin": cosines[own] - others,
            "top1": np.where(rank < 1, 100.0, 0.0),
            "top5": np.where(rank < 5, 100.0, 0.0),
        }
    return pd.DataFrame({**scores, "predicted": similarity.argmax(axis=1)})


def scored(scores: pd.DataFrame) -> list[str]:
    """The keys of the scores in a table that `score` returned."""
    return [key for key in PER_PICTURE if key in scores]


def shuffled(images: JudgedImages, classes: int) -> JudgedImages:
    """The same pictures, each with the label of another class; every other class is used equally often.

    >>> shuffled(JudgedImages(np.eye(4), np.array([0, 0, 1, 1])), classes=3).labels
    array([1, 2, 2, 0])
    """
    shift = 1 + np.arange(len(images.labels)) % (classes - 1)
    return JudgedImages(images.features, (images.labels + shift) % classes)


def nearest(features: Array, reference: Array, size: int | None = None) -> Array:
    """Cosine (N,) of each picture with its nearest image of `reference` (M, D).

    With `size`: the expected cosine with the nearest of `size` random images of `reference`, so that a large and a
    small reference can be compared fairly.

    >>> nearest(np.array([[1.0, 0.0]]), np.array([[0.6, 0.8], [0.8, 0.6]]))
    array([0.8])
    >>> nearest(np.array([[1.0, 0.0]]), np.array([[0.6, 0.8], [0.8, 0.6]]), size=1)
    array([0.7])
    """
    similarity: Array = features @ reference.T  # (N, M)
    if size is None or size >= len(reference):
        largest: Array = similarity.max(axis=1)
        return largest
    similarity.sort(axis=1)  # in place: a copy of millions of cosines costs too much memory
    # The k-th smallest of M is the largest of a random subset of `size` with probability C(k-1, size-1) / C(M, size).
    total = len(reference)
    probability = [
        np.exp(_log_choose(k - 1, size - 1) - _log_choose(total, size)) if k >= size else 0.0
        for k in range(1, total + 1)
    ]
    expected: Array = similarity @ np.array(probability)
    return expected


def compare(
    base: JudgedImages,
    adapter: JudgedImages,
    real: JudgedImages,
    train: JudgedImages,
    texts: ClassTexts,
    *,
    resamples: int,
    seed: int,
) -> ScoreReport:
    """Compare pictures of the base and of the adapter, and score the `real` validation images beside them.

    Row i of `base` and of `adapter` come from the same prompt and the same noise. With one class there are fewer
    scores, and no pictures under wrong names. CMMD and diversity need pairs, so one image alone has neither. Raises
    BestiaryError when images are missing or features are not finite.
    """
    _check(base, adapter, real, texts)
    by_base, of_validation = resample(base, resamples, seed), resample(real, resamples, seed + 1)
    counts = by_base.counts

    def all_scores(pictures: Resampled, reference: Resampled) -> dict[str, Bootstrap]:
        return _mean_scores(score(pictures.images, texts), pictures.counts) | pair_scores(pictures, reference)

    of_base = all_scores(by_base, of_validation)
    of_adapter = all_scores(resample(adapter, resamples, seed), of_validation)
    # Real against real images: the CMMD that two samples of the same source have.
    of_real = all_scores(of_validation, resample(train, resamples, seed + 2))
    several = len(texts.classes) > 1
    floor = _mean_scores(score(shuffled(adapter, len(texts.classes)), texts), counts) if several else {}
    by_class = per_class(base, adapter, texts, resamples=resamples, seed=seed)

    def memorisation(images: JudgedImages) -> Memorisation:
        return _memorisation(images.features, train.features, real.features, counts, resamples, seed)

    return ScoreReport(
        images=len(base.labels),
        base=_estimates(of_base),
        adapter=_estimates(of_adapter),
        delta=_estimates({key: of_adapter[key] - of_base[key] for key in of_base}),
        real=_estimates(of_real),
        floor=_estimates(floor),
        per_template={
            template: TemplateScores(
                base=bootstrap_mean(_clip_scores(base, captions), counts).estimate(),
                adapter=bootstrap_mean(_clip_scores(adapter, captions), counts).estimate(),
            )
            for template, captions in texts.templates.items()
        },
        per_class=by_class,
        worst_classes=tuple(worst_classes(by_class)[:5]),
        memorisation=MemorisationRows(base=memorisation(base), adapter=memorisation(adapter)),
    )


def per_class(
    base: JudgedImages, adapter: JudgedImages, texts: ClassTexts, *, resamples: int, seed: int
) -> dict[str, ClassScores]:
    """For each class: the mean scores of base and adapter, and their paired difference with its interval."""
    base_scores, adapter_scores = score(base, texts), score(adapter, texts)
    table = {}
    for index in np.unique(adapter.labels):
        mask = adapter.labels == index
        counts = resample_counts(int(mask.sum()), resamples, seed)
        of_base, of_adapter = (_mean_scores(scores[mask], counts) for scores in (base_scores, adapter_scores))
        table[texts.classes[index]] = ClassScores(
            base={key: bootstrap.mean for key, bootstrap in of_base.items()},
            adapter={key: bootstrap.mean for key, bootstrap in of_adapter.items()},
            delta=_estimates({key: of_adapter[key] - of_base[key] for key in of_base}),
        )
    return table


def worst_classes(table: Mapping[str, ClassScores]) -> list[str]:
    """The classes of `per_class`, from the one that the adapter draws worst to the one that it draws best."""
    return sorted(table, key=lambda name: (table[name].adapter.get("top1", 0.0), table[name].adapter["clip_score"]))


def confusion(images: JudgedImages, texts: ClassTexts) -> pd.DataFrame:
    """How many pictures of each drawn class (rows) the judge assigns to each class (columns).

    >>> texts = ClassTexts(["bee", "owl"], prompts=np.eye(2), templates={"a photo of {}": np.eye(2)})
    >>> confusion(JudgedImages(np.eye(2), np.array([0, 0])), texts)
         bee  owl
    bee    1    1
    """
    predicted = score(images, texts)["predicted"]
    counts = np.zeros((len(texts.classes), len(texts.classes)), dtype=int)
    np.add.at(counts, (images.labels, predicted), 1)
    drawn = np.unique(images.labels)
    return pd.DataFrame(counts[drawn], index=[texts.classes[index] for index in drawn], columns=list(texts.classes))


def class_table(table: Mapping[str, ClassScores]) -> pd.DataFrame:
    """`per_class` as a flat table, one row for each class, the worst class first."""
    rows = []
    for name in worst_classes(table):
        row: dict[str, str | float] = {"class": name}
        for key, delta in table[name].delta.items():
            row |= {f"base_{key}": table[name].base[key], f"adapter_{key}": table[name].adapter[key]}
            row |= {f"delta_{key}": delta.mean, f"delta_{key}_low": delta.ci95[0], f"delta_{key}_high": delta.ci95[1]}
        rows.append(row)
    return pd.DataFrame(rows)


def picture_table(
    base: JudgedImages, adapter: JudgedImages, texts: ClassTexts, prompts: Sequence[str], seeds: Sequence[int]
) -> pd.DataFrame:
    """One row for each pair of pictures: class, prompt, seed, and the judge's scores and prediction for both."""
    names = np.array(texts.classes)
    table = pd.DataFrame({"class": names[base.labels], "prompt": list(prompts), "seed": list(seeds)})
    for row, images in (("base", base), ("adapter", adapter)):
        scores = score(images, texts)
        for key in ("clip_score", "margin"):
            if key in scores:
                table[f"{row}_{key}"] = scores[key].round(4)
        table[f"{row}_predicted"] = names[scores["predicted"]]
    return table


def closest_pairs(features: Array, reference: Array, count: int) -> list[ClosestPair]:
    """The `count` pictures that are closest to an image of `reference`, the closest first.

    >>> closest_pairs(np.eye(2), np.array([[0.6, 0.8]]), count=1)
    [ClosestPair(picture=1, reference=0, cosine=0.8)]
    """
    similarity = features @ reference.T
    closest = np.argsort(-similarity.max(axis=1), kind="stable")[:count]
    nearest_of = similarity.argmax(axis=1)
    return [ClosestPair(int(row), int(nearest_of[row]), float(similarity[row, nearest_of[row]])) for row in closest]


def bootstrap_copied(features: Array, train: Array, validation: Array, resamples: int, seed: int) -> Bootstrap:
    """The share of pictures whose nearest real image was trained on: 0 as often as by chance, 1 always.

    Many pictures may have the same nearest real image. Whether that image was trained on was drawn only once, by the
    split. So the bootstrap resamples the real images, each together with all pictures that are nearest to it.
    """
    nearest_real, pictures = np.unique((features @ np.vstack([train, validation]).T).argmax(axis=1), return_counts=True)
    drawn = resample_counts(len(nearest_real), resamples, seed) * pictures
    share = drawn @ (nearest_real < len(train)) / drawn.sum(axis=1)
    chance = len(train) / (len(train) + len(validation))
    return _bootstrap((share - chance) / (1.0 - chance))


def _memorisation(
    features: Array, train: Array, validation: Array, counts: Array, resamples: int, seed: int
) -> Memorisation:
    """Cosines with the nearest training and validation image. `gap` compares them at equal sizes: 0 without copying.

    `copied` follows the idea of arXiv:2004.05675.
    """
    size = min(len(train), len(validation))
    gap = nearest(features, train, size) - nearest(features, validation, size)
    return Memorisation(
        nearest_train=bootstrap_mean(nearest(features, train), counts).estimate(),
        nearest_validation=bootstrap_mean(nearest(features, validation), counts).estimate(),
        gap=bootstrap_mean(gap, counts).estimate(),
        copied=bootstrap_copied(features, train, validation, resamples, seed).estimate(),
    )


def _check(base: JudgedImages, adapter: JudgedImages, real: JudgedImages, texts: ClassTexts) -> None:
    if not len(real.labels):
        raise BestiaryError("There are no validation images to compare with. Increase split.val_fraction.")
    if not len(base.labels):
        raise BestiaryError("There are no pictures to compare. Check evaluate.classes and evaluate.seeds.")
    for name, images in (("the base", base), ("the adapter", adapter), ("the validation split", real)):
        missing = [texts.classes[index] for index in np.unique(base.labels) if index not in images.labels]
        if missing:
            raise BestiaryError(f"There are no images of the class {missing[0]} from {name}.")
        if not np.isfinite(images.features).all():
            raise BestiaryError(f"The judge's features of the images from {name} are not finite.")
    if not np.array_equal(base.labels, adapter.labels):
        raise BestiaryError("Base and adapter drew different classes and cannot be compared in pairs.")


def _mean_scores(scores: pd.DataFrame, counts: Array) -> dict[str, Bootstrap]:
    return {key: bootstrap_mean(scores[key], counts) for key in scored(scores)}


def _estimates(scores: Mapping[str, Bootstrap]) -> dict[str, Estimate]:
    return {key: bootstrap.estimate() for key, bootstrap in scores.items()}


def _clip_scores(images: JudgedImages, captions: Array) -> Array:
    """100 x cosine (N,) of each picture with the caption (K, D) of its class."""
    cosines: Array = (images.features * captions[images.labels]).sum(axis=1)
    return 100 * cosines


def _bootstrap(values: Array) -> Bootstrap:
    return Bootstrap(float(values[0]), values[1:])


def _pair_mean(counts: Array, values: Array, weights: Array) -> Array:
    """The weighted mean (1 + R,) of `values` (N, N) over the pairs in each resample of `counts` (1 + R, N)."""
    total: Array = ((counts @ (values * weights)) * counts).sum(axis=1)
    weight: Array = ((counts @ weights) * counts).sum(axis=1)
    # A resample of few pictures may contain no pair. It then takes the value of the data itself.
    return np.divide(total, weight, out=np.full_like(total, total[0] / weight[0]), where=weight > 0)


def _mean_within(counts: Array, kernel: Array, within: NDArray[np.int64]) -> Array:
    """The mean (1 + R,) of `kernel` (N, N) over the pairs of pictures, each stratum of `within` (N,) with its share.

    Pairs within a stratum are fewer than their share, because a picture is no pair with itself, nor with its copies.
    Without the shares, the mean of a resample would be off in one direction.
    """
    total: Array = ((counts @ (kernel * (within[:, None] != within))) * counts).sum(axis=1)
    for stratum in np.unique(within):
        rows = np.flatnonzero(within == stratum)
        total += len(rows) ** 2 * _pair_mean(counts[:, rows], kernel[np.ix_(rows, rows)], _pairs(len(rows)))
    return total / len(within) ** 2


def _pairs(count: int) -> Array:
    """1 for each pair of different pictures, 0 for a picture with itself: (count, count)."""
    return 1 - np.eye(count)


def _kernel(left: Array, right: Array) -> Array:
    squared: Array = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
    kernel: Array = np.exp(-squared / (2 * CMMD_SIGMA**2))
    return kernel


def _log_choose(total: int, size: int) -> float:
    return lgamma(total + 1) - lgamma(size + 1) - lgamma(total - size + 1)
