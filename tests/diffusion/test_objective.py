from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from bestiary.diffusion.base import load_scheduler, load_unet
from bestiary.diffusion.batches import Batch, ValidationGrid, collate
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.objective import prediction_error, pseudo_huber, snr_weights, squared, validation_loss


def test_two_measurements_of_the_same_weights_are_equal(base: Path, latents: Latents) -> None:
    unet, scheduler, accelerator = load_unet(base), load_scheduler(base), Accelerator()
    grid = ValidationGrid(latents.validation, 1000)
    loader = DataLoader(grid, 4, collate_fn=collate)
    found = [validation_loss(unet, scheduler, grid, loader, latents.validation.features, accelerator) for _ in range(2)]
    assert found[0] == found[1]


def test_the_validation_loss_is_that_of_its_bands_and_its_classes(
    base: Path, latents: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def further_off_the_noisier(_unet: object, _scheduler: object, batch: Batch, _features: object) -> torch.Tensor:
        """By 1 for each fifth of the schedule."""
        return (batch["timesteps"] // 200 + 1).view(-1, 1, 1, 1).expand_as(batch["latents"]).float()

    monkeypatch.setattr("bestiary.diffusion.objective.prediction_error", further_off_the_noisier)
    grid = ValidationGrid(latents.validation, 1000)
    loader = DataLoader(grid, 4, collate_fn=collate)
    found = validation_loss(
        load_unet(base), load_scheduler(base), grid, loader, latents.validation.features, Accelerator()
    )
    off = (np.array(grid.timesteps) // 200 + 1) ** 2
    bands = {"0-199": 1, "200-399": 4, "400-599": 9, "600-799": 16, "800-999": 25}
    assert (found.by_band, found.overall) == (bands, off.mean())
    assert found.by_class == {name: off[np.array(grid.classes) == name].mean() for name in set(grid.classes)}


def test_min_snr_weighs_as_the_paper_says(base: Path, v_prediction_base: Path) -> None:
    timesteps = torch.tensor([0, 500, 999])
    for chosen, added in ((base, 0), (v_prediction_base, 1)):
        scheduler = load_scheduler(chosen)
        alphas = scheduler.alphas_cumprod[timesteps]
        snr = alphas / (1 - alphas)
        expected = torch.minimum(snr, torch.tensor(5.0)) / (snr + added)
        torch.testing.assert_close(snr_weights(scheduler, timesteps, 5.0), expected)
        assert snr_weights(scheduler, timesteps, None).tolist() == [1, 1, 1]


def test_the_loss_is_of_what_the_base_predicts(base: Path, v_prediction_base: Path, latents: Latents) -> None:
    grid = ValidationGrid(latents.validation, 1000)
    batch = next(iter(DataLoader(grid, 4)))
    for chosen in (base, v_prediction_base):
        scheduler = load_scheduler(chosen)
        alphas = scheduler.alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
        target = {
            "epsilon": batch["noise"],
            "v_prediction": alphas.sqrt() * batch["noise"] - (1 - alphas).sqrt() * batch["latents"],
        }[scheduler.config.prediction_type]

        class Oracle:
            def __init__(self, sample: torch.Tensor) -> None:
                self.sample = sample

            def __call__(self, *inputs: object) -> "Oracle":
                return self

        error = prediction_error(Oracle(target + 2), scheduler, batch, latents.validation.features)
        torch.testing.assert_close(error, torch.full_like(target, 2))


def test_the_huber_loss_is_squared_for_small_errors_and_linear_for_large_ones() -> None:
    small, large = torch.full((2, 4, 8, 8), 1e-3), torch.full((2, 4, 8, 8), 100.0)
    torch.testing.assert_close(pseudo_huber(small, 0.1), squared(small), rtol=1e-3, atol=0)
    torch.testing.assert_close(pseudo_huber(large, 0.1), torch.full((2,), 2 * 0.1 * 100), rtol=1e-2, atol=0)
