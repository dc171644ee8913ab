import itertools
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch._C._distributed_c10d import GradBucket, HashStore
from torch.nn.parallel import DistributedDataParallel

from bestiary.diffusion import fast_step
from bestiary.diffusion.adapter import inject
from bestiary.diffusion.base import load_unet
from bestiary.diffusion.fast_step import MEASURED, WARM_UP, CompileChoice, FastPrediction, Mode, pays
from bestiary.diffusion.waiting import waiting_bar
from bestiary.errors import BestiaryError


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 5, 32)


def broken_compiler(_model: nn.Module, **_options: object) -> object:
    def call(*_inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no ptxas")

    return call


def test_what_does_not_compile_is_computed_without_compiling(
    base: Path,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unet = load_unet(base)
    expected = unet(*inputs).sample
    predict = FastPrediction(unet)
    monkeypatch.setattr(torch, "compile", broken_compiler)
    predict.use(inputs, compiled=True, graph=False)
    assert torch.equal(predict(*inputs).sample, expected)
    assert unet.conv_in.weight.is_contiguous()
    assert "without torch.compile" in capsys.readouterr().out
    with pytest.raises(BestiaryError, match=r"train\.compile is always, but torch\.compile does not work"):
        predict.use(inputs, compiled=True, graph=False, must=True)


def test_a_compiler_that_computes_something_else_is_not_used(
    base: Path,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unet = load_unet(base).requires_grad_(True)
    expected = unet(*inputs).sample

    def wrong(model: nn.Module, **_options: object) -> object:
        return lambda *given: 1.2 * model(*given)

    monkeypatch.setattr(torch, "compile", wrong)
    predict = FastPrediction(unet)
    predict.use(inputs, compiled=True, graph=False)
    assert torch.equal(predict(*inputs).sample, expected)
    assert "without torch.compile" in capsys.readouterr().out


def test_a_step_with_dropout_can_be_compiled(
    base: Path, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = load_unet(base)
    for parameter in inject(unet, rank=2, alpha=2, dropout=0.5, targets=["to_q", "to_out.0"], seed=0):
        torch.nn.init.normal_(parameter)
    monkeypatch.setattr(torch, "compile", lambda model, **_options: model)
    predict = FastPrediction(unet.train())
    predict.use(inputs, compiled=True, graph=False, must=True)  # drops other inputs than the plain step
    assert predict.fast


def test_the_matrices_of_a_fresh_adapter_are_compared_although_half_of_them_have_no_gradient_yet(
    base: Path, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = load_unet(base)
    parameters = inject(unet, rank=2, alpha=2, dropout=0.0, targets=["to_q"], seed=0)
    before = [parameter.detach().clone() for parameter in parameters]
    gradients = itertools.count()
    downs = [parameter for name, parameter in unet.named_parameters() if "lora_A" in name]
    for down in downs:  # the compiled step's gradients come first
        down.register_hook(lambda gradient: -gradient if next(gradients) < len(downs) else gradient)
    monkeypatch.setattr(torch, "compile", lambda model, **_options: lambda *given: model(*given))
    predict = FastPrediction(unet)
    predict.use(inputs, compiled=True, graph=False)
    assert predict.fast is None
    assert all(torch.equal(*pair) for pair in zip(parameters, before, strict=True))


def test_other_shapes_than_the_trainings_take_the_plain_way(
    base: Path, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = load_unet(base).requires_grad_(True)
    seen: list[torch.Size] = []

    def compiled(model: nn.Module, **_options: object) -> object:
        def call(*given: torch.Tensor) -> torch.Tensor:
            seen.append(given[0].shape)
            answer: torch.Tensor = model(*given)
            return answer

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    predict = FastPrediction(unet)
    predict.use(inputs, compiled=True, graph=False)
    seen.clear()
    predict(*inputs)
    predict(*(tensor[:1] for tensor in inputs))
    assert seen == [inputs[0].shape]


def test_a_captured_graph_is_used_although_it_is_the_same_module(
    base: Path, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[torch.Size] = []

    def captured(module: nn.Module, _example: object) -> nn.Module:
        """As torch.cuda.make_graphed_callables, which needs a GPU: the module itself, with another forward."""
        forward = module.forward

        def replay(*given: torch.Tensor) -> object:
            replays.append(given[0].shape)
            return forward(*given)

        module.forward = replay
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", captured)
    predict = FastPrediction(load_unet(base))
    predict.use(inputs, compiled=False, graph=True)
    predict(*inputs)
    assert replays == [inputs[0].shape]


def test_processes_that_average_gradients_need_not_compile_at_the_same_step(
    base: Path, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged: list[torch.Tensor] = []

    def average(_state: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        averaged.append(bucket.buffer())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    monkeypatch.setattr(torch, "compile", lambda model, **_options: model)
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(load_unet(base).requires_grad_(True))
        model.register_comm_hook(None, average)
        predict = FastPrediction(model)
        predict.use(inputs, compiled=True, graph=False, must=True)
        assert not averaged
        predict(*inputs).sample.mean().backward()
        assert averaged
    finally:
        distributed.destroy_process_group()


def test_a_cpu_and_several_processes_do_not_compile_by_themselves() -> None:
    assert CompileChoice("auto", 100_000, 1).compile_now(torch.device("cpu")) is False
    assert CompileChoice("auto", 100_000, 2).compile_now(torch.device("cuda")) is False
    assert CompileChoice("always", 1, 2).compile_now(torch.device("cuda")) is True
    assert CompileChoice("never", 100_000, 1).compile_now(torch.device("cuda")) is False


def test_a_validation_among_the_measured_steps_does_not_make_compiling_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a run that was stopped just before a validation and resumed. The clock is the test's own."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(fast_step, "_synchronize", lambda _: None)

    def decides(validated: bool) -> bool | None:
        choice, decision = CompileChoice("auto", 1000, 1), None
        while decision is None:
            decision = choice.compile_now(torch.device("cuda"))
            clock[0] += 0.1  # a step
            if validated and choice.done == WARM_UP + 2:
                with choice.paused(torch.device("cuda")):
                    clock[0] += 600
        return decision

    assert pays(0.1, 1000 - WARM_UP - MEASURED) is decides(validated=False) is decides(validated=True) is False


def test_a_choice_is_made_once_and_waits_for_a_batch_of_one_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(fast_step, "_synchronize", lambda _: None)

    def decisions(mode: Mode, waits: int) -> list[bool | None]:
        choice, found = CompileChoice(mode, 15_000, 1), []
        for _ in range(20):
            found.append(choice.compile_now(torch.device("cuda")))
            clock[0] += 0.1 if choice.chosen is None else 0.001
            if choice.chosen is not None and choice.waited < waits:
                choice.wait()
        return found

    undecided = [None] * (WARM_UP + MEASURED)
    assert decisions("auto", MEASURED - 1) == undecided + [True] * 12
    assert decisions("auto", MEASURED) == undecided + [True] * MEASURED + [False] * 7
    assert not capsys.readouterr().out
    assert decisions("always", 20) == [True] * 20
    assert capsys.readouterr().out.count("of several sizes") == 1
    assert decisions("never", 20) == [False] * 20
    assert not capsys.readouterr().out


def test_the_bar_moves_while_nothing_reports(capsys: pytest.CaptureFixture[str]) -> None:
    import time

    with waiting_bar(3):
        time.sleep(1.2)
    assert "00:01 of about 3 s" in capsys.readouterr().err
