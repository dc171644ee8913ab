from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest
import torch
from support.settings import train_settings

from bestiary.diffusion.batches import TrainingStream, ValidationGrid, collate
from bestiary.diffusion.latents import LatentCache, Latents


def stream(cache: LatentCache, timestep_weights: torch.Tensor | None = None, **changes: object) -> TrainingStream:
    weights = torch.ones(1000) if timestep_weights is None else timestep_weights
    return TrainingStream(cache, train_settings(**changes), seed=0, timestep_weights=weights)


def test_the_validation_timesteps_cover_the_schedule_and_each_class(latents: Latents) -> None:
    grid = ValidationGrid(latents.validation, 1000)
    assert sorted(timestep * len(grid) // 1000 for timestep in grid.timesteps) == list(range(len(grid)))


def test_every_image_is_seen_exactly_once_an_epoch(latents: Latents) -> None:
    run = stream(latents.training, steps=15)  # four epochs of 15 images
    assert len(run) == 60
    epochs = [[run.image_at(15 * epoch + index) for index in range(15)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_position_of_the_run_always_gives_the_same_sample(latents: Latents) -> None:
    first, second = (stream(latents.training) for _ in range(2))
    first[3]
    sample, again = first[40], second[40]
    assert torch.equal(sample["latents"], again["latents"])
    assert torch.equal(sample["noise"], again["noise"])
    assert (sample["timesteps"], sample["captions"]) == (again["timesteps"], again["captions"])


def test_captions_belong_to_their_image_and_some_are_dropped(latents: Latents) -> None:
    run = stream(latents.training, caption_dropout=0.2)
    samples = [run[position] for position in range(3000)]
    captions = torch.stack([sample["captions"] for sample in samples])
    assert float((captions == 0).float().mean()) == pytest.approx(0.2, abs=0.03)
    assert len(set(captions.tolist())) == len(latents.training.features)
    classes = [latents.training.images["class"][run.image_at(position)] for position in range(3000)]
    captioned = [latents.training.captions["class"][int(caption)] for caption in captions]
    assert all(found in ("", name) for found, name in zip(captioned, classes, strict=True))
    timesteps = torch.stack([sample["timesteps"] for sample in samples]).float()
    assert int(timesteps.min()) >= 0
    assert float(timesteps.mean()) == pytest.approx(499.5, abs=20)


def test_the_stream_samples_the_posterior_of_both_variants(latents: Latents) -> None:
    mean = torch.tensor([0.0, 100.0]).view(1, 2, 1, 1, 1).expand(15, 2, 4, 8, 8)
    cache = replace(latents.training, shards=[{"mean": mean, "std": torch.full_like(mean, 2.0)}], scaling_factor=0.5)
    run = stream(cache)
    samples = torch.stack([run[position]["latents"] for position in range(1000)])
    mirrored = samples.mean(dim=(1, 2, 3)) > 25
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=0.06)
    for drawn, centre in ((samples[~mirrored], 0), (samples[mirrored], 50)):
        assert float(drawn.mean()) == pytest.approx(centre, abs=0.05)
        assert float(drawn.std()) == pytest.approx(1, abs=0.05)


def test_stratified_timesteps_cover_the_schedule_in_each_epoch(latents: Latents) -> None:
    run = stream(latents.training, timestep_sampling="stratified")
    for epoch in range(3):
        timesteps = [int(run[15 * epoch + index]["timesteps"]) for index in range(15)]
        assert sorted(timestep * 15 // 1000 for timestep in timesteps) == pytest.approx(list(range(15)), abs=1)
        assert timesteps != sorted(timesteps)


def test_timesteps_are_drawn_in_proportion_to_their_weights(latents: Latents) -> None:
    weights = torch.cat([torch.full((500,), 3.0), torch.full((500,), 1.0)])
    run = stream(latents.training, weights)
    early = sum(int(run[position]["timesteps"]) < 500 for position in range(3000))
    assert early / 3000 == pytest.approx(0.75, abs=0.03)


def test_a_noise_offset_shifts_whole_channels(latents: Latents) -> None:
    plain, shifted = stream(latents.training), stream(latents.training, noise_offset=0.5)
    difference = torch.stack([shifted[position]["noise"] - plain[position]["noise"] for position in range(500)])
    assert float(difference.std(dim=(2, 3)).max()) < 1e-6
    assert float(difference.std()) == pytest.approx(0.5, abs=0.05)


@pytest.fixture
def mixed(latents: Latents) -> LatentCache:
    """The training images in three sizes: 6, 5 and 4 of them."""
    counts = {(8, 8): 6, (6, 10): 5, (10, 6): 4}
    shards = [
        {name: torch.full((count, 2, 4, *size), float(count)) for name in ("mean", "std")}
        for size, count in counts.items()
    ]
    return replace(latents.training, shards=shards)


def test_batches_have_one_size_and_each_image_is_seen_once_an_epoch(mixed: LatentCache) -> None:
    run = stream(mixed)
    seen = [run.image_at(position) for position in range(120)]  # eight epochs of 15 images
    assert all(sorted(seen[start : start + 15]) == list(range(15)) for start in range(0, 120, 15))
    sizes = [{mixed.sizes[image] for image in seen[start : start + 4]} for start in range(0, 120, 4)]
    whole_batches_of_one_size = [len(found) == 1 for found in sizes]
    assert sum(whole_batches_of_one_size) >= 8  # at least one an epoch, although no size has a multiple of four
    assert len({next(iter(found)) for found in sizes if len(found) == 1}) == 3
    again = stream(mixed)
    assert [again.image_at(position) for position in (100, 3, 50)] == [seen[position] for position in (100, 3, 50)]


def test_batches_of_large_buckets_have_one_size_and_alternate(latents: Latents) -> None:
    shards = [{name: torch.zeros(60, 1, 1, *size) for name in ("mean", "std")} for size in ((2, 2), (1, 4), (4, 1))]
    images = pd.concat([latents.training.images] * 12, ignore_index=True)
    cache = replace(latents.training, images=images, shards=shards)
    run = stream(cache)
    sizes = [{cache.sizes[run.image_at(start + place)] for place in range(4)} for start in range(0, 1800, 4)]
    assert sum(len(found) == 1 for found in sizes) == len(sizes)
    first = [next(iter(found)) for found in sizes[:45]]
    assert sum(one != other for one, other in pairwise(first)) > 10


def test_a_batch_of_several_sizes_is_split_by_size_and_remembers_the_order(mixed: LatentCache) -> None:
    run = stream(mixed)
    samples = [run[position] for position in range(15)]
    batches = collate(samples)
    assert sorted(len(batch["latents"]) for batch in batches) == [4, 5, 6]
    assert sorted(torch.cat([batch["place"] for batch in batches]).tolist()) == list(range(15))
    for batch in batches:
        for row, place in enumerate(batch["place"].tolist()):
            assert torch.equal(batch["noise"][row], samples[place]["noise"])
