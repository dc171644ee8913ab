import numpy as np
import pytest

from bestiary.errors import BestiaryError
from bestiary.evaluation.fidelity import (
    SubjectPhotos,
    centred,
    centred_by_context,
    copying,
    fidelity,
    in_context,
    leakage,
    leakage_left,
    moved,
)
from bestiary.evaluation.scoring import Array, unit

RESAMPLES = 400
D = 32
CLASS, SUBJECT, OTHER = np.eye(D)[0] * 3, np.eye(D)[1], np.eye(D)[2]


def images(count: int, towards: Array, seed: int, spread: float = 0.15) -> Array:
    """Features of pictures of the class that share something more, and differ at random."""
    return unit(CLASS + towards + spread * np.random.default_rng(seed).normal(size=(count, D)))


@pytest.fixture
def photos() -> SubjectPhotos:
    return SubjectPhotos(
        training=images(12, SUBJECT, 0),
        held_out=images(8, SUBJECT, 1),
        others=images(12, OTHER, 2),
        base_class=images(24, np.zeros(D), 3),
    )


def measured(photos: SubjectPhotos, towards: Array, count: int = 24) -> Array:
    return images(count, towards, 4)


def test_fidelity_is_the_mean_cosine_after_the_class_is_subtracted(photos: SubjectPhotos) -> None:
    adapter, base = images(6, SUBJECT, 4), images(6, np.zeros(D), 5)
    found = fidelity(adapter, base, photos, resamples=RESAMPLES, seed=0)
    middle = np.mean([token / np.linalg.norm(token) for token in photos.base_class], axis=0)

    def mean_cosine(left: Array, right: Array) -> float:
        cosines = []
        for one in left:
            for other in right:
                a, b = one / np.linalg.norm(one) - middle, other / np.linalg.norm(other) - middle
                cosines.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
        return float(np.mean(cosines))

    assert found.adapter.mean == pytest.approx(mean_cosine(adapter, photos.held_out))
    assert found.base.mean == pytest.approx(mean_cosine(base, photos.held_out))
    assert found.others.mean == pytest.approx(mean_cosine(photos.others, photos.held_out))
    assert found.ceiling.mean == pytest.approx(mean_cosine(photos.training, photos.held_out))
    assert found.gain.mean == pytest.approx(found.adapter.mean - found.base.mean)


def test_the_way_is_1_for_the_subject_and_0_for_another_individual(photos: SubjectPhotos) -> None:
    base = measured(photos, np.zeros(D))
    of_subject = fidelity(measured(photos, SUBJECT), base, photos, resamples=RESAMPLES, seed=0)
    of_other = fidelity(measured(photos, OTHER), base, photos, resamples=RESAMPLES, seed=0)
    assert of_subject.way
    assert of_other.way
    assert of_subject.way.mean == pytest.approx(1, abs=0.1)
    assert of_other.way.mean == pytest.approx(0, abs=0.1)
    assert of_subject.above(0.5).ci95[0] > 0 > of_other.above(0.5).ci95[1]


def test_another_individual_of_the_class_beats_the_base_but_not_half_of_the_way(photos: SubjectPhotos) -> None:
    base = measured(photos, -0.5 * SUBJECT)
    found = fidelity(measured(photos, 0.25 * SUBJECT + OTHER), base, photos, resamples=RESAMPLES, seed=0)
    assert found.gain.ci95[0] > 0
    assert found.above(0.5).ci95[1] < 0


def test_above_a_share_of_the_way_is_the_distance_from_that_bar(photos: SubjectPhotos) -> None:
    found = fidelity(
        measured(photos, 0.5 * SUBJECT), measured(photos, np.zeros(D)), photos, resamples=RESAMPLES, seed=0
    )
    bar = found.others.mean + 0.25 * (found.ceiling.mean - found.others.mean)
    assert found.above(0.25).mean == pytest.approx(found.adapter.mean - bar)
    assert found.above(0.0).ci95 == (found.adapter - found.others).ci95


def test_the_gain_is_paired_and_so_surer_than_its_rows(photos: SubjectPhotos) -> None:
    base = images(24, 0.5 * SUBJECT, 6, spread=0.5)
    found = fidelity(unit(base + 0.1 * SUBJECT), base, photos, resamples=RESAMPLES, seed=0)

    def width(ci95: tuple[float, float]) -> float:
        return ci95[1] - ci95[0]

    assert found.gain.ci95[0] > 0
    assert width(found.gain.ci95) < 0.5 * width(found.adapter.ci95)


def test_intervals_cover_the_choice_of_pictures_and_of_held_out_photos() -> None:
    base_class = images(200, np.zeros(D), 3)

    def mean_and_interval(first_seed: int, pictures: int, photos: int) -> tuple[float, tuple[float, float]]:
        adapter, base, training, held_out, others = (
            images(count, SUBJECT, first_seed + number, 0.4)
            for number, count in enumerate((pictures, pictures, photos, photos, photos))
        )
        compared = SubjectPhotos(training, held_out, others, base_class)
        found = fidelity(adapter, base, compared, resamples=200, seed=0).adapter
        return found.mean, found.ci95

    truth, _ = mean_and_interval(10, 1000, 1000)
    intervals = [mean_and_interval(100 + 10 * draw, 12, 8)[1] for draw in range(60)]
    assert sum(low <= truth <= high for low, high in intervals) >= 50


def test_the_same_seed_gives_the_same_intervals(photos: SubjectPhotos) -> None:
    adapter, base = measured(photos, SUBJECT), measured(photos, np.zeros(D))
    first, second = (fidelity(adapter, base, photos, resamples=RESAMPLES, seed=3).adapter.ci95 for _ in range(2))
    assert first == second


def test_a_judge_that_sees_no_individuals_gives_no_way(photos: SubjectPhotos) -> None:
    blind = SubjectPhotos(photos.training, photos.held_out, images(12, SUBJECT, 7), photos.base_class)
    found = fidelity(measured(photos, SUBJECT), measured(photos, OTHER), blind, resamples=RESAMPLES, seed=0)
    assert found.way is None


def test_moved_is_0_for_the_same_pictures_and_grows_with_the_angle() -> None:
    angle = np.deg2rad(60)
    turned = np.array([[np.cos(angle), np.sin(angle)]])
    assert moved(np.array([[1.0, 0.0]]), turned) == pytest.approx([50.0])
    assert moved(3 * turned, turned) == pytest.approx([0.0])


def test_leakage_says_how_far_pictures_move_and_whether_towards_the_subject(photos: SubjectPhotos) -> None:
    base = measured(photos, np.zeros(D))
    same = leakage(base, base, photos, resamples=RESAMPLES, seed=0)
    assert same.moved.ci95 == pytest.approx((0, 0))
    assert same.nearer.ci95 == (0, 0)
    leaking = leakage(unit(base + 0.3 * SUBJECT), base, photos, resamples=RESAMPLES, seed=0)
    elsewhere = leakage(unit(base + 0.3 * OTHER), base, photos, resamples=RESAMPLES, seed=0)
    assert leaking.moved.mean == pytest.approx(elsewhere.moved.mean, rel=0.2)
    assert leaking.nearer.ci95[0] > 0.2
    assert elsewhere.nearer.ci95[1] < 0.05


def test_the_leakage_that_is_left_is_a_paired_share(photos: SubjectPhotos) -> None:
    base = measured(photos, np.zeros(D))
    free, half = unit(base + 0.4 * SUBJECT), unit(base + 0.2 * SUBJECT)
    assert leakage_left(free, free, base, resamples=RESAMPLES, seed=0).ci95 == pytest.approx((1, 1))
    left = leakage_left(half, free, base, resamples=RESAMPLES, seed=0)
    assert left.mean == pytest.approx(moved(half, base).mean() / moved(free, base).mean())
    assert left.ci95[1] < 0.5
    with pytest.raises(BestiaryError, match="without preservation moves no picture"):
        leakage_left(half, base, base, resamples=RESAMPLES, seed=0)


@pytest.mark.parametrize(("training", "held_out"), [(12, 12), (16, 4), (4, 12)])
def test_copies_have_the_copying_share_1_and_new_photos_0(training: int, held_out: int) -> None:
    shares: dict[str, list[float]] = {"copies": [], "fresh": []}
    for draw in range(20):
        train, held, fresh = (images(n, SUBJECT, 3 * draw + k) for k, n in enumerate((training, held_out, 40)))
        for name, pictures in (("copies", train), ("fresh", fresh)):
            share = copying(pictures, train, held, resamples=RESAMPLES, seed=0).share
            assert share
            shares[name].append(share.mean)
    assert shares["copies"] == pytest.approx([1.0] * 20)
    assert np.mean(shares["fresh"]) == pytest.approx(0, abs=0.15)


def test_near_copies_lie_between_new_photos_and_copies() -> None:
    train, held = images(8, SUBJECT, 1), images(8, SUBJECT, 2)
    noise = np.random.default_rng(5).normal(size=(32, D))
    near = unit(np.repeat(train, 4, axis=0) + 0.06 * noise)
    found = copying(near, train, held, resamples=RESAMPLES, seed=0)
    assert found.fresh.mean < found.gap.mean < found.copies.mean
    assert found.share
    assert 0.4 < found.share.ci95[0] < found.share.ci95[1] < 1


def test_the_gaps_are_differences_of_nearest_cosines() -> None:
    train, held, pictures = images(3, SUBJECT, 1), images(4, SUBJECT, 2), images(5, SUBJECT, 3)
    found = copying(pictures, train, held, resamples=RESAMPLES, seed=0)

    def nearest_of(image: Array, photos: Array) -> float:
        return max(float(image @ photo) for photo in photos)

    expected = np.mean([nearest_of(picture, train) - nearest_of(picture, held) for picture in pictures])
    assert found.gap.mean == pytest.approx(expected)
    expected = np.mean([1 - nearest_of(photo, held) for photo in train])
    assert found.copies.mean == pytest.approx(expected)
    expected = np.mean(
        [nearest_of(held[row], train) - nearest_of(held[row], np.delete(held, row, 0)) for row in range(4)]
    )
    assert found.fresh.mean == pytest.approx(expected)


def test_copying_that_cannot_be_seen_has_no_share() -> None:
    same = np.repeat(images(1, SUBJECT, 0), 6, axis=0)
    assert copying(same, same, same, resamples=RESAMPLES, seed=0).share is None


def test_wrong_input_is_named(photos: SubjectPhotos) -> None:
    pictures = measured(photos, SUBJECT)
    with pytest.raises(BestiaryError, match=r"24 pictures of the adapter and 23 of the base"):
        fidelity(pictures, pictures[1:], photos, resamples=RESAMPLES, seed=0)
    with pytest.raises(BestiaryError, match="1 held-out photos"):
        copying(pictures, photos.training, photos.held_out[:1], resamples=RESAMPLES, seed=0)
    with pytest.raises(BestiaryError, match=r"pictures of the base are not finite"):
        leakage(pictures, pictures * np.nan, photos, resamples=RESAMPLES, seed=0)


def test_centred_features_are_unit_vectors_whatever_their_scale() -> None:
    tokens, of_class = images(5, SUBJECT, 0), images(9, np.zeros(D), 1)
    assert np.linalg.norm(centred(tokens, of_class), axis=1) == pytest.approx(np.ones(5))
    assert centred(7 * tokens, 3 * of_class) == pytest.approx(centred(tokens, of_class))


SNOW = 2 * np.eye(D)[3]  # what a context changes in any picture
ONE_CONTEXT = np.zeros(16, dtype=np.int64)


def test_in_contexts_the_subject_gains_on_its_class_and_an_adapter_that_ignores_the_name_does_not(
    photos: SubjectPhotos,
) -> None:
    plain, class_in_context = images(16, SNOW, 10), images(16, SNOW, 11)

    def gain(adapter: Array) -> tuple[float, float]:
        return in_context(adapter, plain, class_in_context, ONE_CONTEXT, photos, resamples=RESAMPLES, seed=0).gain.ci95

    assert gain(images(16, SNOW + SUBJECT, 12))[0] > 0.3
    low, high = gain(images(16, SNOW, 13))
    assert low < 0 < high
    assert gain(images(16, SNOW + OTHER, 14))[0] < 0.1


def test_the_context_itself_is_no_likeness(photos: SubjectPhotos) -> None:
    """The plain measure falls for the photos of a subject that was photographed in the snow."""
    in_snow = SubjectPhotos(
        images(12, SUBJECT + SNOW, 0), images(8, SUBJECT + SNOW, 1), photos.others, photos.base_class
    )
    plain, class_in_context = images(16, SNOW, 10), images(16, SNOW, 11)
    found = in_context(images(16, SNOW, 13), plain, class_in_context, ONE_CONTEXT, in_snow, resamples=RESAMPLES, seed=0)
    assert abs(found.adapter.mean) < 0.2
    assert fidelity(images(16, SNOW, 13), plain, in_snow, resamples=RESAMPLES, seed=0).adapter.mean > 0.5


def test_what_each_context_adds_is_removed_not_what_they_add_on_average(photos: SubjectPhotos) -> None:
    """Half of the contexts look like what the photos show: a plain picture there is no likeness either."""
    two = np.repeat([0, 1], 8)

    def mixed(seed: int) -> Array:
        return np.vstack([images(8, SUBJECT + SNOW, seed), images(8, -SUBJECT, seed + 1)])

    found = in_context(mixed(10), mixed(20), mixed(30), two, photos, resamples=RESAMPLES, seed=0)
    assert abs(found.plain.mean) < 0.15
    # Between two contexts whose effects cancel out, a common mean keeps all that each of them adds.
    by_row = centred_by_context(mixed(10), mixed(30), two)
    common = centred(mixed(10), mixed(30))
    held_out = centred(photos.held_out, photos.base_class)
    assert (common[:8] @ held_out.T).mean() > 0.3
    assert abs((by_row[:8] @ held_out.T).mean()) < 0.2
