import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from support.settings import encode_settings, train_settings
from support.tiny import CLASSES, manifests
from support.training import adapter_weights, all_equal, in_training_batch, least_unet, run_training

from bestiary.diffusion.adapter import save_adapter, verify_adapter
from bestiary.diffusion.adapter_format import Provenance
from bestiary.diffusion.base import load_pipeline, load_scheduler, load_unet
from bestiary.diffusion.encoding import encode_images
from bestiary.diffusion.fast_step import CompileChoice, FastPrediction
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.progress import TrainingResult
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.training import train
from bestiary.errors import BestiaryError
from bestiary.samplers import Sampling

SUPPORT = Path(__file__).parents[1] / "support"
# A child process imports what this one can, the tests' helpers included.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture(scope="module")
def plain(base: Path, latents_folder: Path) -> list[torch.Tensor]:
    """The adapter that the tests' settings train."""
    return adapter_weights(run_training(base, Latents.open(latents_folder))[1])


@pytest.fixture
def bucketed(base: Path, pictures: Path, tmp_path: Path) -> Latents:
    """The pictures in buckets of their own shapes."""
    settings = encode_settings(flip=False, aspect_ratio_buckets=True)
    encode_images(base, pictures, manifests(pictures), tmp_path / "bucketed", settings)
    return Latents.open(tmp_path / "bucketed")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_training_lowers_the_validation_loss_and_its_adapter_verifies(
    prediction_type: str, base: Path, v_prediction_base: Path, latents: Latents, tmp_path: Path
) -> None:
    chosen = base if prediction_type == "epsilon" else v_prediction_base
    result, unet = run_training(chosen, latents, steps=20, validate_every=10)
    assert result.val_loss < result.base_val_loss
    assert result.best_step in (10, 20)
    assert verify_adapter(save_adapter(unet, tmp_path, Provenance()), chosen).rank == 2


def test_the_report_has_the_promised_keys_and_finite_numbers(base: Path, latents: Latents) -> None:
    result, _ = run_training(base, latents)
    report = {**result.results(), **result.costs()}
    assert result.costs().keys() == {"images_per_second", "peak_memory_mib", "seconds"}
    promised = "steps best_step train_loss val_loss images_per_second peak_memory_mib trainable_parameters seconds"
    assert set(promised.split()) <= report.keys()
    bands = report.pop("val_loss_by_band")
    assert isinstance(bands, dict)
    assert {"0-199", "800-999"} <= bands.keys()
    numbers = [value for value in report.values() if isinstance(value, int | float)]
    assert len(numbers) == len(report)
    assert all(math.isfinite(value) for value in [*numbers, *bands.values()])
    assert result.steps == 8
    assert set(result.val_loss_by_class) == set(CLASSES)


def test_the_history_has_a_row_at_each_validation_and_every_tenth_step(base: Path, latents: Latents) -> None:
    result, _ = run_training(base, latents, steps=13, validate_every=5)
    assert [row["step"] for row in result.history] == [0, 5, 10, 13]
    assert [round(row["epoch"], 2) for row in result.history] == [0, 1.33, 2.67, 3.47]
    assert all("val_loss" in row for row in result.history)
    assert [row["step"] for row in run_training(base, latents, steps=11, validate_every=11)[0].history] == [0, 10, 11]


def test_training_twice_gives_the_same_weights_and_another_seed_gives_others(
    base: Path, latents: Latents, plain: list[torch.Tensor]
) -> None:
    assert all_equal(adapter_weights(run_training(base, latents)[1]), plain)
    assert not all_equal(adapter_weights(run_training(base, latents, seed=1)[1]), plain)


def test_dropout_is_the_same_in_every_run_with_the_same_seed(
    base: Path, latents: Latents, plain: list[torch.Tensor]
) -> None:
    first, second = (adapter_weights(run_training(base, latents, dropout=0.2)[1]) for _ in range(2))
    assert all_equal(first, second)
    assert not all_equal(first, plain)


def test_compiling_draws_nothing_that_dropout_needs(
    base: Path, latents: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that compiles at its first step, and one that was resumed and compiles at a later one, drop the same."""
    plain = adapter_weights(run_training(base, latents, dropout=0.2)[1])
    use = FastPrediction.use

    def drawing(*arguments: Any, **named: Any) -> None:
        torch.rand(1)
        use(*arguments, **named)

    monkeypatch.setattr(FastPrediction, "use", drawing)
    assert all_equal(adapter_weights(run_training(base, latents, dropout=0.2)[1]), plain)


def test_a_step_is_compiled_for_a_whole_batch_of_one_size(
    base: Path, bucketed: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples: list[int] = []
    use = FastPrediction.use

    def seen(predict: FastPrediction, example: tuple[torch.Tensor, torch.Tensor, torch.Tensor], **named: Any) -> None:
        examples.append(len(example[0]))
        use(predict, example, **named)

    monkeypatch.setattr(FastPrediction, "use", seen)
    for step in range(4):
        decisions = chain(repeat(None, step), repeat(False))  # the choice falls before this step
        monkeypatch.setattr(CompileChoice, "compile_now", lambda *_, known=decisions: next(known))
        run_training(base, bucketed, batch_size=6, steps=6)
    assert examples == [6, 6, 6, 6]


def test_accumulated_batches_train_like_one_large_batch(
    base: Path, latents: Latents, plain: list[torch.Tensor]
) -> None:
    for first, second in zip(plain, adapter_weights(run_training(base, latents, accumulation=4)[1]), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_does_not_change_the_losses(base: Path, latents: Latents) -> None:
    plain, checkpointed = (run_training(base, latents, gradient_checkpointing=on, steps=3)[0] for on in (False, True))
    assert checkpointed.val_loss == pytest.approx(plain.val_loss, rel=1e-5)


def test_the_moving_average_is_validated_and_kept(base: Path, latents: Latents) -> None:
    # An average that hardly moves stays near the base; the trained weights do not.
    slow, fast = (
        run_training(base, latents, ema_decay=decay, steps=20, validate_every=20)[0] for decay in (0.999, 0.0)
    )
    assert fast.val_loss < slow.val_loss < slow.base_val_loss


def test_the_best_step_is_kept_instead_of_the_last(base: Path, latents: Latents) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    unet = load_unet(base)
    settings = train_settings(
        steps=12, validate_every=2, learning_rate=0.3, ema_decay=0.0, learning_rate_schedule="constant"
    )
    result = train(
        unet,
        load_scheduler(base),
        latents,
        settings,
        seed=0,
        on_validation=lambda step: seen.update({step: adapter_weights(unet)}),
    )
    losses = {int(row["step"]): row["val_loss"] for row in result.history if row["step"]}
    assert result.best_step == min(losses, key=lambda step: losses[step])
    assert result.val_loss == losses[result.best_step]
    assert all_equal(adapter_weights(unet), seen[result.best_step])


def test_the_first_validation_sees_the_base(base: Path, latents: Latents) -> None:
    outputs = []
    unet = load_unet(base)
    inputs = torch.randn(1, 4, 8, 8), 10, torch.randn(1, 4, 32)
    expected = unet(*inputs).sample

    def compute(step: int) -> None:
        with torch.no_grad():
            outputs.append(unet(*inputs).sample)

    train(unet, load_scheduler(base), latents, train_settings(), seed=0, on_validation=compute)
    torch.testing.assert_close(outputs[0], expected)
    assert len(outputs) == 3
    assert not torch.allclose(outputs[-1], expected)


def test_the_gradient_norm_is_logged_before_clipping(base: Path, latents: Latents) -> None:
    result, _ = run_training(base, latents, max_grad_norm=1e-6, steps=3)
    assert result.history[-1]["grad_norm"] > 1e-3


def test_a_loss_that_is_not_finite_stops_training_and_names_the_learning_rate(base: Path, latents: Latents) -> None:
    with pytest.raises(BestiaryError, match=r"loss .*train\.learning_rate"):
        run_training(base, latents, learning_rate=1e30, max_grad_norm=1e30, ema_decay=0.0)


def test_latents_of_another_base_are_rejected(base: Path, latents: Latents) -> None:
    training = latents.training
    wide = replace(training, features=torch.zeros(22, 77, 48))
    with pytest.raises(BestiaryError, match=r"captions .*48 .*32"):
        run_training(base, replace(latents, training=wide))
    shards = [{name: value[:, :, :3] for name, value in shard.items()} for shard in training.shards]
    with pytest.raises(BestiaryError, match=r"latents .*3 .*4"):
        run_training(base, replace(latents, training=replace(training, shards=shards)))


def test_a_batch_that_cannot_be_split_evenly_is_rejected(base: Path, latents: Latents) -> None:
    with pytest.raises(BestiaryError, match=r"train\.batch_size is 4 .*train\.accumulation 3"):
        run_training(base, latents, accumulation=3)


def test_the_bundled_base_trains(base_folder: Path, pictures: Path, tmp_path: Path) -> None:
    encode_images(base_folder, pictures, manifests(pictures), tmp_path, encode_settings(resolution=64, batch_size=8))
    result, unet = run_training(base_folder, Latents.open(tmp_path), steps=2)
    verify_adapter(save_adapter(unet, tmp_path / "adapter", Provenance()), base_folder)
    assert math.isfinite(result.val_loss)


class KilledError(Exception):
    pass


def without_speed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The rows of a history without the column that differs in every run."""
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


def test_training_that_is_killed_three_times_ends_with_the_same_adapter_and_history(
    base: Path, latents: Latents, tmp_path: Path
) -> None:
    settings = train_settings(steps=17, validate_every=6, dropout=0.1, accumulation=2)
    rows: list[tuple[int, float]] = []

    def run(checkpoints: Path | None, killed_in_batch: int = 0) -> tuple[TrainingResult, bytes]:
        def kill() -> None:
            raise KilledError

        unet = load_unet(base)
        in_training_batch(unet, killed_in_batch, kill)
        rows.clear()
        result = train(
            unet,
            load_scheduler(base),
            latents,
            settings,
            seed=0,
            checkpoints=checkpoints,
            on_log=lambda step, row: rows.append((step, row["epoch"])),
        )
        return result, save_adapter(unet, tmp_path / "adapter", Provenance()).read_bytes()

    expected, adapter = run(None)
    expected_rows = list(rows)
    for batch in (6, 22, 10):  # in steps 3 and 11, then in step 15 of a run that has resumed after step 10
        with pytest.raises(KilledError):
            run(tmp_path / "checkpoints", batch)
    result, resumed = run(tmp_path / "checkpoints")
    assert resumed == adapter
    assert rows == expected_rows
    assert without_speed(result.history) == without_speed(expected.history)
    assert result.val_loss_by_class == expected.val_loss_by_class


@pytest.mark.parametrize(("stop_early", "steps"), [({}, [12, 0]), ({"patience": 1, "min_delta": 10.0}, [4, 0])])
def test_finished_training_resumes_from_its_last_checkpoint_with_the_same_result(
    stop_early: dict[str, object], steps: list[int], base: Path, latents: Latents, tmp_path: Path
) -> None:
    settings = train_settings(steps=12, validate_every=2, **stop_early)

    def run() -> tuple[TrainingResult, list[torch.Tensor], int]:
        unet, batches = load_unet(base), []
        unet.register_forward_pre_hook(lambda module, _: batches.append(1) if module.training else None)
        result = train(unet, load_scheduler(base), latents, settings, seed=0, checkpoints=tmp_path)
        return result, adapter_weights(unet), len(batches)

    (first, weights, *trained), (again, same_weights, *trained_again) = run(), run()
    assert [*trained, *trained_again] == steps
    assert all_equal(weights, same_weights)
    assert first.results() == again.results()
    assert without_speed(first.history) == without_speed(again.history)


def test_sigterm_saves_a_checkpoint_that_training_resumes_from(base: Path, latents: Latents, tmp_path: Path) -> None:
    def terminate(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    unet, settings = load_unet(base), train_settings(steps=11)
    with pytest.raises(BestiaryError, match=r"SIGTERM after step 4 of 11.* resume"):
        train(unet, load_scheduler(base), latents, settings, seed=0, on_validation=terminate, checkpoints=tmp_path)
    resumed, whole = load_unet(base), load_unet(base)
    train(resumed, load_scheduler(base), latents, settings, seed=0, checkpoints=tmp_path)
    train(whole, load_scheduler(base), latents, settings, seed=0)
    assert all_equal(adapter_weights(resumed), adapter_weights(whole))


def test_sigterm_between_two_rows_of_the_history_loses_no_loss(base: Path, latents: Latents, tmp_path: Path) -> None:
    settings = train_settings(steps=12, validate_every=12)

    def history(checkpoints: Path | None = None, stopped_in_batch: int = 0) -> list[dict[str, float]]:
        unet = load_unet(base)
        in_training_batch(unet, stopped_in_batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = train(unet, load_scheduler(base), latents, settings, seed=0, checkpoints=checkpoints)
        return without_speed(result.history)

    whole = history()
    with pytest.raises(BestiaryError, match="SIGTERM after step 5 of 12"):
        history(tmp_path, stopped_in_batch=5)
    assert history(tmp_path) == whole


def test_training_stops_when_patience_runs_out(base: Path, latents: Latents) -> None:
    result, _ = run_training(base, latents, steps=20, validate_every=3, patience=2, min_delta=10.0)
    assert (result.steps, result.best_step) == (9, 3)


def test_the_clip_score_can_choose_the_best_step_and_stop_training(base: Path, latents: Latents) -> None:
    scores = {0: 40.0, 2: 20.0, 4: 30.0, 6: 30.5, 8: 29.0}
    settings = train_settings(steps=20, validate_every=2, criterion="clip_score", patience=2, min_delta=1.0)
    seen: dict[int, list[torch.Tensor]] = {}
    unet = load_unet(base)

    def draw(step: int) -> float:
        seen[step] = adapter_weights(unet)
        return scores[step]

    result = train(unet, load_scheduler(base), latents, settings, seed=0, on_validation=draw)
    assert (result.steps, result.best_step) == (8, 4)
    assert (result.clip_score, result.base_clip_score) == (30.0, 40.0)
    assert [row["clip_score"] for row in result.history] == list(scores.values())
    assert all_equal(adapter_weights(unet), seen[4])


def test_the_criterion_clip_score_needs_scored_pictures(base: Path, latents: Latents) -> None:
    with pytest.raises(BestiaryError, match=r"train\.criterion is clip_score"):
        run_training(base, latents, criterion="clip_score")


@pytest.mark.usefixtures("bfloat16")
def test_in_half_precision_the_adapter_trains_in_float32_and_pictures_can_be_drawn(
    base: Path, latents: Latents, tmp_path: Path
) -> None:
    pipeline = load_pipeline(base, device="cpu", dtype=torch.bfloat16)
    sheets = []

    def draw(step: int) -> None:
        sampling = Sampling("dpmsolver++", steps=2, guidance_scale=3.0)
        sheets.extend(generate(pipeline, ["a zebra"], [0], sampling, batch_size=1))

    result = train(pipeline.unet, load_scheduler(base), latents, train_settings(), seed=0, on_validation=draw)
    assert result.val_loss < result.base_val_loss
    assert {weight.dtype for weight in adapter_weights(pipeline.unet)} == {torch.float32}
    assert len({sheet.tobytes() for sheet in sheets}) == 3
    verify_adapter(save_adapter(pipeline.unet, tmp_path, Provenance()), base)


@pytest.mark.parametrize(
    "option",
    [
        {"huber_c": 0.1},
        {"noise_offset": 0.05},
        {"timestep_sampling": "stratified"},
        {"timestep_sampling": "importance"},
        {"use_rslora": True},
        {"use_dora": True},
        {"min_snr_gamma": None},
    ],
)
def test_each_option_changes_the_weights_and_training_still_learns(
    base: Path, latents: Latents, plain: list[torch.Tensor], option: dict[str, Any]
) -> None:
    result, unet = run_training(base, latents, **option)
    assert result.val_loss < result.base_val_loss
    assert len(adapter_weights(unet)) != len(plain) or not all_equal(adapter_weights(unet), plain)


def test_a_cache_of_several_sizes_trains(base: Path, bucketed: Latents) -> None:
    assert len(set(bucketed.training.sizes)) > 1
    result, _ = run_training(base, bucketed)
    assert result.val_loss < result.base_val_loss
    alone, _ = run_training(base, bucketed, accumulation=4)  # batches of one image, so never of two sizes
    assert result.val_loss == pytest.approx(alone.val_loss, abs=1e-4)


def test_8_bit_adam_without_bitsandbytes_says_how_to_install_it(
    base: Path, latents: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(BestiaryError, match=r"train\.optimizer .*bestiary\[adamw8bit\]"):
        run_training(base, latents, optimizer="adamw8bit")


def test_8_bit_adam_learns_and_resumes(base: Path, latents: Latents, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = train_settings(steps=12, optimizer="adamw8bit", rank=64, alpha=64, learning_rate=1e-3)

    class KilledHereError(Exception):
        pass

    def die(step: int) -> None:
        if step == 8:
            raise KilledHereError

    whole, resumed = load_unet(base), load_unet(base)
    result = train(whole, load_scheduler(base), latents, settings, seed=0)
    assert result.val_loss < result.base_val_loss
    with pytest.raises(KilledHereError):
        train(load_unet(base), load_scheduler(base), latents, settings, seed=0, on_validation=die, checkpoints=tmp_path)
    train(resumed, load_scheduler(base), latents, settings, seed=0, checkpoints=tmp_path)
    assert all_equal(adapter_weights(resumed), adapter_weights(whole))


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate remembers whether a process compiled its first training, and PyTorch caches what it compiled."""
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
def test_compiled_training_gives_the_same_loss(base: Path, latents: Latents) -> None:
    def run(compile_choice: str) -> tuple[float, UNet2DConditionModel]:
        unet = least_unet()
        # There are 6 images to validate on: one shape for all batches.
        settings = train_settings(steps=2, validate_every=2, batch_size=3, compile=compile_choice)
        AcceleratorState._reset_state(reset_partial_state=True)
        return train(unet, load_scheduler(base), latents, settings, seed=0).val_loss, unet

    plain, _ = run("never")
    compiled, unet = run("always")
    assert compiled == pytest.approx(plain, rel=2e-3)  # other kernels round differently
    assert adapter_weights(unet)


@pytest.mark.usefixtures("fresh_accelerator")
def test_compiling_on_a_machine_without_a_compiler_is_rejected(
    base: Path, latents: Latents, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(BestiaryError, match=r"train\.compile"):
        run_training(base, latents, compile="always")


@pytest.mark.slow
def test_encoding_and_training_killed_at_random_times_end_with_the_same_bytes(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "support.interrupted_work", str(base), str(pictures)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as starter:
        assert starter.stdin is not None
        assert starter.stdout is not None
        commands, answers = starter.stdin, starter.stdout

        def attempt(folder: Path, seconds: float | None = None) -> int:
            """Work in `folder`, killed after so many seconds of processor time; returns the exit status."""
            commands.write(f"{folder}\n")
            commands.flush()
            child = int(answers.readline())
            with suppress(psutil.NoSuchProcess):  # it may have ended already
                while seconds is not None and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
                    if psutil.Process(child).cpu_times().user >= seconds:
                        os.kill(child, signal.SIGKILL)
                        break
                    time.sleep(0.03)
            return int(answers.readline())

        assert attempt(tmp_path / "whole") == 0
        random = Random(0)
        killed = 0
        while attempt(tmp_path / "killed", random.uniform(0.05, 0.4 + killed / 10)) != 0:
            killed += 1
            assert killed < 30, "it makes no progress"
        commands.close()
    assert killed >= 2
    for name in ("adapter", "latents"):
        files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / name).iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "killed" / name).iterdir()} == files


@pytest.mark.slow
def test_two_processes_encode_and_train_like_one_and_see_each_image_once_an_epoch(
    base: Path, pictures: Path, latents: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This is what `accelerate launch` starts on GPUs; on CPUs it would need MPI.
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2"
    arguments = [str(path) for path in (SUPPORT / "two_processes.py", base, pictures, tmp_path)]
    subprocess.run([sys.executable, *launch.split(), *arguments], env=ENVIRONMENT, check=True)
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1))
    monkeypatch.setattr("bestiary.diffusion.encoding.SHARD_IMAGES", 4)
    encode_images(base, pictures, manifests(pictures), tmp_path / "alone", encode_settings())
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "latents" / path.name).read_bytes()
    counts = [len(found["encoded"]) for found in (first, second)]
    assert len(set(first["encoded"] + second["encoded"])) == sum(counts) == 21  # each image is encoded by one of them
    assert min(counts) >= 9  # neither is idle
    alone, _ = run_training(base, latents, steps=15)
    for found in (first, second):
        assert found["val_loss"] == pytest.approx(alone.val_loss, abs=1e-5)
        assert found["train_loss"] == pytest.approx(alone.train_loss, abs=1e-5)
    assert sorted(first["positions"] + second["positions"]) == list(range(60))  # four epochs of 15 images
    assert len(first["positions"]) == len(second["positions"])


@pytest.mark.slow
def test_one_step_at_the_size_of_stable_diffusion_fits_in_8_gib() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "support.training"],
        env={name: ENVIRONMENT[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30)),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    assert float(done.stdout.splitlines()[-1]) < 8 * 1024
