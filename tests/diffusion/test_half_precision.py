import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.settings import train_settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bestiary.diffusion.base import load_scheduler, load_unet
from bestiary.diffusion.half_precision import TrainedWeights
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.training import train

HALF = torch.bfloat16
SUPPORT = Path(__file__).parents[1] / "support"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class Casts(TorchDispatchMode):
    """Counts what is cast between float32 and bfloat16, and the convolutions that leave the contiguous layout."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.casts: Counter[tuple[int, ...]] = Counter()
        self.channels_last = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            given = args[0]
            if func is torch.ops.aten._to_copy.default and {given.dtype, result.dtype} == {torch.float32, HALF}:
                self.casts[tuple(result.shape)] += 1
            if func is torch.ops.aten.convolution.default:
                self.channels_last += not result.is_contiguous()
        return result


@pytest.mark.usefixtures("bfloat16")
def test_a_step_in_bfloat16_casts_no_activations_and_stays_contiguous(base: Path, latents: Latents) -> None:
    unet = load_unet(base, dtype=HALF)
    inside = [0]
    counted = Casts()

    def begin(module: nn.Module, _inputs: object) -> None:
        if module.training:
            inside[0] += 1
            if inside[0] == 2:  # the first step creates what later steps use again
                counted.__enter__()  # type: ignore[no-untyped-call]

    unet.register_forward_pre_hook(begin)
    settings = train_settings(steps=2, validate_every=2, batch_size=4)

    def stop(_step: int) -> None:
        if inside[0] == 2:
            counted.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    train(unet, load_scheduler(base), latents, settings, seed=0, on_validation=stop)
    inputs_and_outputs = {shape for shape in counted.casts if shape[1:] == (4, 8, 8)}
    assert inputs_and_outputs  # it was counted
    activations = {shape for shape in counted.casts if len(shape) > 2} - inputs_and_outputs
    assert not activations
    assert counted.channels_last == 0


def test_weights_are_float32_and_the_parameters_are_their_rounded_copies() -> None:
    layer = nn.Linear(3, 2)
    exact = [parameter.detach().clone() for parameter in layer.parameters()]
    trained = TrainedWeights(list(layer.parameters()), HALF)
    assert [weight.dtype for weight in trained.weights] == [torch.float32]
    assert layer.weight.dtype is HALF
    assert torch.equal(layer.weight, exact[0].to(HALF))
    with trained.in_float32():
        assert torch.equal(layer.weight, exact[0])
    with torch.no_grad():
        trained.weights[0].add_(1.0)
    trained.spread()
    assert torch.equal(layer.bias, (exact[1] + 1).to(HALF))
    trained.give_back()
    assert torch.equal(layer.bias, exact[1] + 1)


def test_gradients_of_several_batches_add_up_in_float32() -> None:
    layer = nn.Linear(1, 1, bias=False)
    trained = TrainedWeights(list(layer.parameters()), HALF)
    for value in (256.0, 1.0):  # their sum is no bfloat16 number
        (layer.weight * value).sum().backward()
        trained.collect_gradients()
    assert trained.weights[0].grad is not None
    assert trained.weights[0].grad.tolist() == [257.0]
    assert layer.weight.grad is None


@pytest.mark.slow
@pytest.mark.usefixtures("bfloat16")
def test_two_processes_with_accumulation_train_as_one_does(
    base: Path, pictures: Path, latents: Latents, tmp_path: Path
) -> None:
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2"
    arguments = [str(path) for path in (SUPPORT / "two_processes.py", base, pictures, tmp_path)]
    subprocess.run([sys.executable, *launch.split(), *arguments, "2"], env=ENVIRONMENT, check=True)
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1))
    assert first["weights"] == second["weights"]
    settings = train_settings(steps=15, accumulation=4)  # the same parts of a batch, one after the other
    alone = train(load_unet(base, dtype=HALF), load_scheduler(base), latents, settings, seed=0)
    assert first["val_loss"] == pytest.approx(alone.val_loss, rel=1e-4)
    assert alone.val_loss < alone.base_val_loss - 0.002


def test_in_float32_the_parameters_are_the_weights() -> None:
    parameters = list(nn.Linear(2, 2).parameters())
    trained = TrainedWeights(parameters, torch.float32)
    assert all(weight is parameter for weight, parameter in zip(trained.weights, parameters, strict=True))
