"""Measure an adapter of one subject by pictures: fidelity, leakage and copying, with bootstrap intervals.

All functions take the judge's class tokens (`Judge.class_tokens`) or other image features, as unit vectors.
Letters: N pictures, M photos, D features, R resamples. "Photos" are real images of the subject.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bestiary.errors import BestiaryError
from bestiary.evaluation.scoring import Array, Bootstrap, bootstrap_mean, nearest, resample_counts, unit

SMALLEST = 1e-9  # a difference of cosines below this is none


@dataclass(frozen=True)
class SubjectPhotos:
    """What an adapter's pictures are compared with, as features (M, D) each.

    `others` should be photos. The base's pictures of the class word are no substitute: with them, the bundled base's
    own pictures are 0.79 of the way to the ceiling before anything is taught.
    """

    training: Array  # photos that the adapter was trained on
    held_out: Array  # photos that it was not trained on
    others: Array  # photos of other individuals of the class
    base_class: Array  # the base's pictures of the class word


@dataclass(frozen=True)
class Fidelity:
    """The mean likeness to the held-out photos of each row, from the same resamples of these photos."""

    base: Bootstrap
    adapter: Bootstrap
    gain: Bootstrap  # adapter minus base, on the same noise
    others: Bootstrap  # other individuals of the class: what a wrong individual reaches
    ceiling: Bootstrap  # the training photos: what real images of the subject reach

    @property
    def way(self) -> Bootstrap | None:
        """The adapter's share of the way from other individuals (0) to the ceiling (1).

        Above 1 where pictures vary less than photos. None when the judge does not tell the subject from other
        individuals for certain: the 95 % interval of the ceiling minus the others then reaches 0.
        """
        whole = self.ceiling - self.others
        if whole.ci95[0] <= SMALLEST:
            return None
        done = self.adapter - self.others
        return Bootstrap(done.mean / whole.mean, done.resampled / np.maximum(whole.resampled, SMALLEST))

    def above(self, share: float) -> Bootstrap:
        """How far the adapter is above this share of the way. Unlike `way` it divides by nothing.

        The adapter shows the subject for certain when the whole interval of `above(0.5)` is above 0.
        """

        def bar(others: Array | float, ceiling: Array | float) -> Array:
            return np.asarray(others + share * (ceiling - others), dtype=np.float64)

        return Bootstrap(
            self.adapter.mean - float(bar(self.others.mean, self.ceiling.mean)),
            self.adapter.resampled - bar(self.others.resampled, self.ceiling.resampled),
        )


@dataclass(frozen=True)
class InContext:
    """Likeness to the held-out photos of pictures in contexts, with what the contexts change in any picture removed."""

    adapter: Bootstrap
    plain: Bootstrap  # the base's pictures of the class word in the same contexts: what ignores the name reaches
    gain: Bootstrap  # adapter minus plain, on the same noise


@dataclass(frozen=True)
class Leakage:
    """What the adapter does to pictures that are not about its subject. Both are 0 for the base."""

    moved: Bootstrap  # 100 x (1 - cosine) between the adapter's and the base's picture of one seed
    nearer: Bootstrap  # how much more the adapter's picture looks like the subject's photos than the base's does


@dataclass(frozen=True)
class Copying:
    """The mean gap between a picture's cosines with its nearest training and its nearest held-out photo."""

    gap: Bootstrap
    copies: Bootstrap  # the gap of exact copies of the training photos
    fresh: Bootstrap  # the gap of new photos: each held-out photo against the training and the other held-out photos

    @property
    def share(self) -> Bootstrap | None:
        """Where the gap lies between that of fresh photos (0) and that of exact copies (1); may be outside.

        None when exact copies do not differ from fresh photos for certain, so that copying cannot be seen.
        """
        whole = self.copies - self.fresh
        if whole.ci95[0] <= SMALLEST:
            return None
        done = self.gap - self.fresh
        return Bootstrap(done.mean / whole.mean, done.resampled / np.maximum(whole.resampled, SMALLEST))


def centred(features: Array, base_class: Array) -> Array:
    """Features (N, D) less the mean of the base's pictures of the class word (M, D), scaled to length 1 again.

    What all pictures of the class have in common says nothing about the individual.

    >>> centred(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])).round(2)
    array([[ 0.71, -0.71]])
    """
    return unit(unit(features) - unit(base_class).mean(axis=0))


def centred_by_context(features: Array, class_in_context: Array, contexts: NDArray[np.int64]) -> Array:
    """Features (N, D) less the mean of the class's pictures (N, D) of the same context, scaled to length 1 again.

    contexts (N,) names the context of each row of both. One mean over all contexts would leave in what each of them
    adds to any picture, and a drawing would be unlike the photos because it is a drawing.
    """
    means = np.empty_like(features)
    for context in np.unique(contexts):
        means[contexts == context] = unit(class_in_context[contexts == context]).mean(axis=0)
    return unit(unit(features) - means)


def fidelity(adapter: Array, base: Array, photos: SubjectPhotos, *, resamples: int, seed: int) -> Fidelity:
    """How much the pictures (N, D) of adapter and base look like the held-out photos: the mean centred cosine.

    Row i of `adapter` and of `base` come from the same prompt and the same noise. Pictures and photos are both
    resampled, the held-out photos together for all rows.

    One held-out photo is enough, but then the intervals do not cover which photo it was. Raises BestiaryError when
    there is none, when there are fewer than two pictures or other photos, or when features are not finite.
    """
    _check_pairs(adapter, base)
    _check(photos.training, "training photos")
    _check(photos.held_out, "held-out photos", least=1)
    _check(photos.others, "pictures of other individuals")
    _check(photos.base_class, "pictures that the base draws of the class word")
    held_out = centred(photos.held_out, photos.base_class)
    held_counts = resample_counts(len(held_out), resamples, seed)
    counts = resample_counts(len(adapter), resamples, seed + 1)

    def row(features: Array, counts: Array) -> Bootstrap:
        return _likeness(centred(features, photos.base_class), held_out, counts, held_counts)

    of_adapter, of_base = row(adapter, counts), row(base, counts)
    return Fidelity(
        base=of_base,
        adapter=of_adapter,
        gain=of_adapter - of_base,
        others=row(photos.others, resample_counts(len(photos.others), resamples, seed + 2)),
        ceiling=row(photos.training, resample_counts(len(photos.training), resamples, seed + 3)),
    )


def in_context(
    adapter: Array,
    plain: Array,
    class_in_context: Array,
    contexts: NDArray[np.int64],
    photos: SubjectPhotos,
    *,
    resamples: int,
    seed: int,
) -> InContext:
    """How much pictures (N, D) in contexts show what sets the subject apart from its class.

    Row i of `adapter` (prompted with the name) and of `plain` (the base, prompted with the class word) come from the
    same context, named by `contexts` (N,), and noise. `class_in_context` holds further pictures like `plain`, in the
    same order of contexts: their mean in each context is what class and context look like, and is subtracted as
    `centred` subtracts the class from the photos.

    Raises BestiaryError when there are fewer than two pictures or photos of a kind, or features are not finite.
    """
    _check_pairs(adapter, plain)
    _check(class_in_context, "pictures that the base draws of the class word in contexts")
    _check_pairs(adapter, class_in_context)
    held_out = centred(photos.held_out, photos.base_class)
    held_counts = resample_counts(len(held_out), resamples, seed)
    counts = resample_counts(len(adapter), resamples, seed + 1)
    of_adapter, of_plain = (
        _likeness(centred_by_context(features, class_in_context, contexts), held_out, counts, held_counts)
        for features in (adapter, plain)
    )
    return InContext(of_adapter, of_plain, of_adapter - of_plain)


def likeness(pictures: Array, photos: SubjectPhotos) -> Array:
    """The mean centred cosine of each picture with the held-out photos: (N, D) -> (N,)."""
    means: Array = (centred(pictures, photos.base_class) @ centred(photos.held_out, photos.base_class).T).mean(axis=1)
    return means


def moved(adapter: Array, base: Array) -> Array:
    """100 x (1 - cosine) between each picture of the adapter and that of the base: (N, D) each -> (N,).

    >>> moved(np.eye(2), np.array([[1.0, 0.0], [1.0, 0.0]]))
    array([  0., 100.])
    """
    distances: Array = 100 * (1 - (unit(adapter) * unit(base)).sum(axis=1))
    return distances


def leakage(adapter: Array, base: Array, photos: SubjectPhotos, *, resamples: int, seed: int) -> Leakage:
    """How far pictures (N, D) of prompts without the subject's name move from the base's, and towards the subject.

    Row i of `adapter` and of `base` come from the same prompt and the same noise. `nearer` compares centred cosines
    with all photos of the subject.

    Raises BestiaryError when there are fewer than two pictures, or features are not finite.
    """
    _check_pairs(adapter, base)
    counts = resample_counts(len(adapter), resamples, seed)
    subject = centred(np.vstack([photos.training, photos.held_out]), photos.base_class)

    nearer = ((centred(adapter, photos.base_class) - centred(base, photos.base_class)) @ subject.T).mean(axis=1)
    return Leakage(moved=bootstrap_mean(moved(adapter, base), counts), nearer=bootstrap_mean(nearer, counts))


def leakage_left(preserving: Array, free: Array, base: Array, *, resamples: int, seed: int) -> Bootstrap:
    """The share of an adapter's leakage that is left with preservation: 0 none, 1 all of it.

    Row i of `preserving`, `free` (the same training without preservation) and `base` (N, D) come from the same prompt
    and the same noise. Raises BestiaryError when the adapter without preservation moves nothing.
    """
    _check_pairs(preserving, base)
    _check_pairs(free, base)
    counts = resample_counts(len(base), resamples, seed)
    on, off = (bootstrap_mean(moved(features, base), counts) for features in (preserving, free))
    if off.mean <= SMALLEST:
        raise BestiaryError(
            "The adapter without preservation moves no picture, so no share of its leakage can be left."
        )
    return Bootstrap(on.mean / off.mean, on.resampled / np.maximum(off.resampled, SMALLEST))


def copying(pictures: Array, training: Array, held_out: Array, *, resamples: int, seed: int) -> Copying:
    """Compare how near pictures (N, D) of the subject come to training and to held-out photos (M, D).

    With more training than held-out photos, the nearest training photo is nearer by chance. The gap of fresh photos has
    the same advantage, so `share` is about 0 without copying. Subsets of equal size, as in `nearest`, would hide
    most copies when few photos are held out. Pictures and, for the two ends, photos are resampled; which photos were
    held out is not, so with fewer than six of them the interval is too narrow.

    Raises BestiaryError when there are fewer than two pictures or photos of a kind, or features are not finite.
    """
    _check(pictures, "pictures")
    _check(training, "training photos")
    _check(held_out, "held-out photos")
    pictures, training, held_out = unit(pictures), unit(training), unit(held_out)

    def mean(nearest_training: Array, nearest_held_out: Array, offset: int) -> Bootstrap:
        counts = resample_counts(len(nearest_training), resamples, seed + offset)
        return bootstrap_mean(nearest_training - nearest_held_out, counts)

    # A held-out photo is compared with the others only, as a new photo would be.
    nearest_other = np.concatenate(
        [nearest(photo[None], np.delete(held_out, row, axis=0)) for row, photo in enumerate(held_out)]
    )
    return Copying(
        gap=mean(nearest(pictures, training), nearest(pictures, held_out), 0),
        copies=mean(nearest(training, training), nearest(training, held_out), 1),
        fresh=mean(nearest(held_out, training), nearest_other, 2),
    )


def _likeness(features: Array, held_out: Array, counts: Array, held_counts: Array) -> Bootstrap:
    """The mean cosine of features (N, D) with the held-out photos (M, D), both resampled."""
    sums = ((counts @ (features @ held_out.T)) * held_counts).sum(axis=1)
    return _bootstrap(sums / (counts.sum(axis=1) * held_counts.sum(axis=1)))


def _check_pairs(adapter: Array, base: Array) -> None:
    _check(adapter, "pictures of the adapter")
    _check(base, "pictures of the base")
    if len(adapter) != len(base):
        raise BestiaryError(
            f"There are {len(adapter)} pictures of the adapter and {len(base)} of the base. Draw both from the same "
            "prompts and seeds."
        )


def _check(features: Array, what: str, least: int = 2) -> None:
    if len(features) < least:
        raise BestiaryError(
            f"There are {len(features)} {what}, and a measurement needs at least {least}. Add more of them."
        )
    if not np.isfinite(features).all():
        raise BestiaryError(f"The judge's features of the {what} are not finite.")


def _bootstrap(values: Array) -> Bootstrap:
    return Bootstrap(float(values[0]), values[1:])
