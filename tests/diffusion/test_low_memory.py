"""One key trains on a small GPU."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.settings import train_settings
from support.training import adapter_weights, run_training

from bestiary.diffusion import low_memory as module
from bestiary.diffusion.base import load_scheduler, load_unet
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.low_memory import images_at_a_time, low_memory
from bestiary.diffusion.provenance import training_provenance
from bestiary.diffusion.training import train
from bestiary.errors import BestiaryError
from bestiary.params import Model

MEANT: dict[str, Any] = {"accumulation": 4, "gradient_checkpointing": True, "compile": "never", "optimizer": "adamw"}


@pytest.fixture(autouse=True)
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)


def test_low_memory_trains_as_the_settings_that_it_stands_for(base: Path, latents: Latents) -> None:
    unet, rows = load_unet(base), set()
    unet.register_forward_pre_hook(lambda _, inputs: rows.add(len(inputs[0])))
    train(unet, load_scheduler(base), latents, train_settings(low_memory=True), seed=0)
    assert rows == {1}  # in validations, too
    spelled_out = adapter_weights(run_training(base, latents, **MEANT)[1])
    for first, second in zip(adapter_weights(unet), spelled_out, strict=True):
        torch.testing.assert_close(first, second)


def test_the_8_bit_optimizer_is_used_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def works(_: torch.device) -> Callable[..., torch.optim.Optimizer]:
        return torch.optim.AdamW

    asked_for = train_settings(low_memory=True, optimizer="adamw8bit")
    assert low_memory(train_settings(low_memory=True), 1).optimizer == "adamw"
    assert low_memory(asked_for, 1).optimizer == "adamw8bit"  # training then says that bitsandbytes is missing
    monkeypatch.setattr(module, "load_adamw8bit", works)
    assert low_memory(train_settings(low_memory=True), 1).optimizer == "adamw8bit"
    assert low_memory(train_settings(), 1) == train_settings()


def test_the_images_of_a_step_are_split_evenly_over_the_processes() -> None:
    settings = train_settings(low_memory=True, batch_size=16, accumulation=3)
    for processes, accumulation in ((1, 16), (2, 8), (16, 1)):
        assert images_at_a_time(settings, processes) == 1
        meant = low_memory(settings, processes)
        assert meant.accumulation == accumulation
        assert low_memory(meant, processes) == meant
    for act in (images_at_a_time, low_memory):
        with pytest.raises(BestiaryError, match=r"batch_size is 16 and cannot .* over 3 processes. .* multiple of 3\."):
            act(settings, 3)


def test_the_adapters_file_names_the_settings_that_low_memory_stands_for(base: Path, latents: Latents) -> None:
    def params(**changes: object) -> dict[str, object]:
        model = Model(model=str(base), revision=None)
        return training_provenance(model, latents, train_settings(**changes), seed=7, resolution=32).params or {}

    assert params(low_memory=True) == {**params(), **MEANT, "low_memory": True}
    assert "low_memory" not in params()
