from dataclasses import replace

import pytest
import torch

from bestiary.diffusion.batches import TrainingStream, ValidationGrid
from bestiary.diffusion.latents import LatentCache

Caches = tuple[LatentCache, LatentCache]


def stream(cache: LatentCache, length: int, **changes: object) -> TrainingStream:
    options = {"seed": 0, "caption_dropout": 0.1, "noise_offset": 0.0, "stratified": False}
    options |= {"timestep_weights": torch.ones(1000)} | changes
    return TrainingStream(cache, length, **options)  # type: ignore[arg-type]


def test_the_validation_timesteps_cover_the_schedule_and_each_class(caches: Caches) -> None:
    grid = ValidationGrid(caches[1], 1000)
    assert sorted(timestep * len(grid) // 1000 for timestep in grid.timesteps) == list(range(len(grid)))


def test_every_image_is_seen_exactly_once_an_epoch(caches: Caches) -> None:
    run = stream(caches[0], 60)  # four epochs of 15 images
    epochs = [[run.image_at(15 * epoch + index) for index in range(15)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_position_of_the_run_is_always_the_same_sample(caches: Caches) -> None:
    first, second = (stream(caches[0], 48) for _ in range(2))
    first[3]
    for name, value in first[40].items():
        assert torch.equal(value, second[40][name])


def test_captions_speak_of_their_image_and_are_dropped_now_and_then(caches: Caches) -> None:
    run = stream(caches[0], 3000, caption_dropout=0.2)
    samples = [run[position] for position in range(3000)]
    captions = torch.stack([sample["captions"] for sample in samples])
    assert float((captions == 0).float().mean()) == pytest.approx(0.2, abs=0.03)
    assert len(captions.unique()) == len(caches[0].features)
    classes = [caches[0].images["class"][run.image_at(position)] for position in range(3000)]
    captioned = [caches[0].captions["class"][int(caption)] for caption in captions]
    assert all(wrote in ("", name) for wrote, name in zip(captioned, classes, strict=True))
    timesteps = torch.stack([sample["timesteps"] for sample in samples]).float()
    assert int(timesteps.min()) >= 0
    assert float(timesteps.mean()) == pytest.approx(499.5, abs=20)


def test_the_stream_samples_the_posterior_of_both_variants(caches: Caches) -> None:
    mean = torch.tensor([0.0, 100.0]).view(1, 2, 1, 1, 1).expand(15, 2, 4, 8, 8)
    cache = replace(caches[0], shards=[{"mean": mean, "std": torch.full_like(mean, 2.0)}], scaling_factor=0.5)
    run = stream(cache, 1000)
    latents = torch.stack([run[position]["latents"] for position in range(1000)])
    mirrored = latents.mean(dim=(1, 2, 3)) > 25
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=0.06)
    for drawn, centre in ((latents[~mirrored], 0), (latents[mirrored], 50)):
        assert float(drawn.mean()) == pytest.approx(centre, abs=0.05)
        assert float(drawn.std()) == pytest.approx(1, abs=0.05)


def test_stratified_timesteps_cover_the_schedule_in_each_epoch(caches: Caches) -> None:
    run = stream(caches[0], 45, stratified=True)
    for epoch in range(3):
        timesteps = [int(run[15 * epoch + index]["timesteps"]) for index in range(15)]
        assert sorted(timestep * 15 // 1000 for timestep in timesteps) == pytest.approx(list(range(15)), abs=1)
        assert timesteps != sorted(timesteps)


def test_timesteps_are_drawn_as_often_as_their_weights_say(caches: Caches) -> None:
    weights = torch.cat([torch.full((500,), 3.0), torch.full((500,), 1.0)])
    run = stream(caches[0], 3000, timestep_weights=weights)
    early = sum(int(run[position]["timesteps"]) < 500 for position in range(3000))
    assert early / 3000 == pytest.approx(0.75, abs=0.03)


def test_a_noise_offset_shifts_whole_channels(caches: Caches) -> None:
    plain, shifted = stream(caches[0], 500), stream(caches[0], 500, noise_offset=0.5)
    difference = torch.stack([shifted[position]["noise"] - plain[position]["noise"] for position in range(500)])
    assert float(difference.std(dim=(2, 3)).max()) < 1e-6
    assert float(difference.std()) == pytest.approx(0.5, abs=0.05)
