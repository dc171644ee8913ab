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
from pathlib import Path
from random import Random

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from tiny import CLASSES, manifests

from bestiary.diffusion import latents as encoding
from bestiary.diffusion.adapter import save_adapter, verify_adapter
from bestiary.diffusion.base import load_pipeline, load_scheduler, load_unet
from bestiary.diffusion.latents import LatentCache, encode_images
from bestiary.diffusion.progress import TrainingResult
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.training import Ema, TrainingSettings, learning_rate_factor, train
from bestiary.errors import BestiaryError

Caches = tuple[LatentCache, LatentCache]
SETTINGS = TrainingSettings(
    rank=2,
    alpha=8,
    dropout=0.0,
    targets=["to_q", "to_k", "to_v", "to_out.0"],
    caption_dropout=0.1,
    min_snr_gamma=5.0,
    max_grad_norm=1.0,
    weight_decay=0.01,
    ema_decay=0.9,
    steps=8,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=2,
    validate_every=4,
    seed=0,
    checkpoint_seconds=0.0,
)


def run(base: Path, caches: Caches, **changes: object) -> tuple[TrainingResult, UNet2DConditionModel]:
    unet = load_unet(base)
    return train(unet, load_scheduler(base), *caches, replace(SETTINGS, **changes)), unet  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain(base: Path, latents: Path) -> list[torch.Tensor]:
    """The adapter that SETTINGS give."""
    return weights(run(base, (LatentCache.open(latents, "train"), LatentCache.open(latents, "val")))[1])


@pytest.fixture
def bucketed(base: Path, pictures: Path, tmp_path: Path) -> Caches:
    """The pictures in buckets of their own shapes."""
    how = {"resolution": 32, "flip": False, "batch_size": 4, "aspect_ratio_buckets": True}
    encode_images(base, pictures, manifests(pictures), tmp_path / "bucketed", **how)  # type: ignore[arg-type]
    return LatentCache.open(tmp_path / "bucketed", "train"), LatentCache.open(tmp_path / "bucketed", "val")


def weights(unet: UNet2DConditionModel) -> list[torch.Tensor]:
    return [value.clone() for name, value in unet.state_dict().items() if "lora" in name]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_training_lowers_the_validation_loss_and_its_adapter_is_verified(
    prediction_type: str, base: Path, v_prediction_base: Path, caches: Caches, tmp_path: Path
) -> None:
    chosen = base if prediction_type == "epsilon" else v_prediction_base
    result, unet = run(chosen, caches, steps=20, validate_every=10)
    assert result.val_loss < result.base_val_loss
    assert result.best_step in (10, 20)
    assert verify_adapter(save_adapter(unet, tmp_path, {}), chosen).rank == 2


def test_the_report_has_the_promised_numbers_all_finite(base: Path, caches: Caches) -> None:
    result, _ = run(base, caches)
    report = result.report()
    promised = "steps best_step train_loss val_loss images_per_second peak_memory_mib trainable_parameters seconds"
    assert set(promised.split()) <= report.keys()
    bands = report.pop("val_loss_by_band")
    assert {"0-199", "800-999"} <= bands.keys()
    assert all(math.isfinite(value) for value in [*report.values(), *bands.values()])
    assert result.steps == 8
    assert set(result.val_loss_by_class) == set(CLASSES)


def test_the_history_has_a_row_for_each_validation_and_each_tenth_step(base: Path, caches: Caches) -> None:
    result, _ = run(base, caches, steps=13, validate_every=5)
    assert [row["step"] for row in result.history] == [0, 5, 10, 13]
    assert [round(row["epoch"], 2) for row in result.history] == [0, 1.33, 2.67, 3.47]
    assert all("val_loss" in row for row in result.history)
    assert [row["step"] for row in run(base, caches, steps=11, validate_every=11)[0].history] == [0, 10, 11]


def test_two_trainings_give_the_same_weights_and_another_seed_does_not(
    base: Path, caches: Caches, plain: list[torch.Tensor]
) -> None:
    assert equal(weights(run(base, caches)[1]), plain)
    assert not equal(weights(run(base, caches, seed=1)[1]), plain)


def test_dropout_is_the_same_in_every_run(base: Path, caches: Caches, plain: list[torch.Tensor]) -> None:
    first, second = (weights(run(base, caches, dropout=0.2)[1]) for _ in range(2))
    assert equal(first, second)
    assert not equal(first, plain)


def test_accumulated_steps_train_as_one_large_batch_does(base: Path, caches: Caches, plain: list[torch.Tensor]) -> None:
    for first, second in zip(plain, weights(run(base, caches, accumulation=4)[1]), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(base: Path, caches: Caches) -> None:
    plain, checkpointed = (run(base, caches, gradient_checkpointing=on, steps=3)[0] for on in (False, True))
    assert checkpointed.val_loss == pytest.approx(plain.val_loss, rel=1e-5)


def test_the_moving_average_is_what_is_validated_and_kept(base: Path, caches: Caches) -> None:
    # An average that hardly moves stays near the base; the trained weights do not.
    slow, fast = (run(base, caches, ema_decay=decay, steps=20, validate_every=20)[0] for decay in (0.999, 0.0))
    assert fast.val_loss < slow.val_loss < slow.base_val_loss


def test_the_best_step_is_kept_not_the_last(base: Path, caches: Caches) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    unet = load_unet(base)
    settings = replace(
        SETTINGS, steps=12, validate_every=2, learning_rate=0.3, ema_decay=0.0, learning_rate_schedule="constant"
    )
    result = train(
        unet, load_scheduler(base), *caches, settings, on_validation=lambda step: seen.update({step: weights(unet)})
    )
    losses = {int(row["step"]): row["val_loss"] for row in result.history if row["step"]}
    assert result.best_step == min(losses, key=lambda step: losses[step])
    assert result.val_loss == losses[result.best_step]
    assert equal(weights(unet), seen[result.best_step])


def test_the_first_validation_sees_the_base(base: Path, caches: Caches) -> None:
    outputs = []
    unet = load_unet(base)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 32)
    expected = unet(latents, 10, text).sample

    def look(step: int) -> None:
        with torch.no_grad():
            outputs.append(unet(latents, 10, text).sample)

    train(unet, load_scheduler(base), *caches, SETTINGS, on_validation=look)
    torch.testing.assert_close(outputs[0], expected)
    assert len(outputs) == 3
    assert not torch.allclose(outputs[-1], expected)


def test_the_gradient_norm_is_logged_before_clipping(base: Path, caches: Caches) -> None:
    result, _ = run(base, caches, max_grad_norm=1e-6, steps=3)
    assert result.history[-1]["grad_norm"] > 1e-3


@pytest.mark.parametrize(("schedule", "middle", "end"), [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)])
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule: str, middle: float, end: float) -> None:
    settings = replace(SETTINGS, steps=110, warmup_steps=10, learning_rate_schedule=schedule)
    rates = [learning_rate_factor(settings, step) for step in range(111)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[0] > 0
    assert (rates[10], rates[60], rates[110]) == pytest.approx((1, middle, end))


def test_a_loss_that_is_no_number_is_a_plain_sentence_that_names_the_step(base: Path, caches: Caches) -> None:
    with pytest.raises(BestiaryError, match=r"loss .*lower train.learning_rate"):
        run(base, caches, learning_rate=1e30, max_grad_norm=1e30, ema_decay=0.0)


def test_latents_of_another_base_are_a_plain_sentence(base: Path, caches: Caches) -> None:
    training, validation = caches
    wide = replace(training, features=torch.zeros(22, 77, 48))
    with pytest.raises(BestiaryError, match="captions have 48 features and the UNet takes 32"):
        run(base, (wide, validation))
    shards = [{name: value[:, :, :3] for name, value in shard.items()} for shard in training.shards]
    with pytest.raises(BestiaryError, match="latents have 3 channels and the base's UNet takes 4"):
        run(base, (replace(training, shards=shards), validation))


def test_a_batch_that_cannot_be_shared_evenly_is_a_plain_sentence(base: Path, caches: Caches) -> None:
    with pytest.raises(BestiaryError, match=r"train.batch_size is 4, which 1 processes with 3 accumulated steps"):
        run(base, caches, accumulation=3)


def test_the_embedded_base_trains(base_folder: Path, pictures: Path, tmp_path: Path) -> None:
    encode_images(base_folder, pictures, manifests(pictures), tmp_path, resolution=64, flip=True, batch_size=8)
    caches = LatentCache.open(tmp_path, "train"), LatentCache.open(tmp_path, "val")
    result, unet = run(base_folder, caches, steps=2)
    verify_adapter(save_adapter(unet, tmp_path / "adapter", {}), base_folder)
    assert math.isfinite(result.val_loss)


class KilledError(Exception):
    pass


def test_a_training_interrupted_again_and_again_ends_with_the_same_adapter_and_curve(
    base: Path, caches: Caches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, steps=17, validate_every=6, dropout=0.1, accumulation=2)
    rows: list[tuple[int, object]] = []

    def trained(checkpoints: Path | None) -> tuple[TrainingResult, bytes]:
        unet = load_unet(base)
        rows.clear()
        result = train(
            unet,
            load_scheduler(base),
            *caches,
            settings,
            checkpoints=checkpoints,
            on_log=lambda step, row: rows.append((step, row["epoch"])),
        )
        return result, save_adapter(unet, tmp_path / "adapter", {}).read_bytes()

    expected, adapter = trained(None)
    told = list(rows)
    update, deadly = Ema.update, [3, 11, 15]

    def die(self: Ema, now: int) -> None:
        if deadly and now == deadly[0]:
            deadly.pop(0)
            raise KilledError
        update(self, now)

    monkeypatch.setattr(Ema, "update", die)
    for _ in range(3):
        with pytest.raises(KilledError):
            trained(tmp_path / "checkpoints")
    result, resumed = trained(tmp_path / "checkpoints")
    assert resumed == adapter
    assert rows == told
    timing = {"images_per_second"}
    assert [{key: row[key] for key in row.keys() - timing} for row in result.history] == [
        {key: row[key] for key in row.keys() - timing} for row in expected.history
    ]
    assert result.val_loss_by_class == expected.val_loss_by_class


def test_sigterm_keeps_the_state_and_says_how_to_go_on(base: Path, caches: Caches, tmp_path: Path) -> None:
    def terminate(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    unet, settings = load_unet(base), replace(SETTINGS, steps=11)
    with pytest.raises(BestiaryError, match=r"stop \(SIGTERM\) and did so after step 4 of 11: .* same command goes on"):
        train(unet, load_scheduler(base), *caches, settings, on_validation=terminate, checkpoints=tmp_path)
    resumed, whole = load_unet(base), load_unet(base)
    train(resumed, load_scheduler(base), *caches, settings, checkpoints=tmp_path)
    train(whole, load_scheduler(base), *caches, settings)
    assert equal(weights(resumed), weights(whole))


def test_sigterm_between_two_rows_of_the_curve_loses_no_loss(
    base: Path, caches: Caches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, steps=12, validate_every=12)

    def curve(checkpoints: Path | None = None) -> list[dict[str, float]]:
        result = train(load_unet(base), load_scheduler(base), *caches, settings, checkpoints=checkpoints)
        return [{name: value for name, value in row.items() if name != "images_per_second"} for row in result.history]

    whole = curve()
    update = Ema.update

    def terminate(average: Ema, step: int) -> None:
        update(average, step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Ema, "update", terminate)
    with pytest.raises(BestiaryError, match="after step 5 of 12"):
        curve(tmp_path)
    assert curve(tmp_path) == whole


def test_training_ends_when_nothing_has_improved_for_a_while(base: Path, caches: Caches) -> None:
    result, _ = run(base, caches, steps=20, validate_every=3, patience=2, min_delta=10.0)
    assert (result.steps, result.best_step) == (9, 3)


def test_the_clip_score_can_choose_the_best_step_and_end_the_training(base: Path, caches: Caches) -> None:
    scores = {0: 40.0, 2: 20.0, 4: 30.0, 6: 30.5, 8: 29.0}
    settings = replace(SETTINGS, steps=20, validate_every=2, criterion="clip_score", patience=2, min_delta=1.0)
    seen: dict[int, list[torch.Tensor]] = {}
    unet = load_unet(base)

    def draw(step: int) -> float:
        seen[step] = weights(unet)
        return scores[step]

    result = train(unet, load_scheduler(base), *caches, settings, on_validation=draw)
    assert (result.steps, result.best_step) == (8, 4)
    assert (result.clip_score, result.base_clip_score) == (30.0, 40.0)
    assert [row["clip_score"] for row in result.history] == list(scores.values())
    assert equal(weights(unet), seen[4])


def test_a_clip_score_that_nobody_measures_is_a_plain_sentence(base: Path, caches: Caches) -> None:
    with pytest.raises(BestiaryError, match=r"train\.criterion is clip_score, and nothing scores"):
        run(base, caches, criterion="clip_score")


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU: the base in bfloat16, autocast around the UNet."""
    monkeypatch.setattr("bestiary.diffusion.training.device_and_dtype", lambda: (torch.device("cpu"), torch.bfloat16))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("bfloat16")
def test_in_half_precision_the_adapter_trains_in_float32_and_sheets_are_drawn(
    base: Path, caches: Caches, tmp_path: Path
) -> None:
    pipeline = load_pipeline(base, device="cpu", dtype=torch.bfloat16)
    sheets = []

    def draw(step: int) -> None:
        how = {"steps": 2, "guidance_scale": 3.0, "scheduler": "dpmsolver++", "batch_size": 1}
        sheets.extend(generate(pipeline, ["a zebra"], [0], **how))  # type: ignore[arg-type]

    result = train(pipeline.unet, load_scheduler(base), *caches, SETTINGS, on_validation=draw)
    assert result.val_loss < result.base_val_loss
    assert {weight.dtype for weight in weights(pipeline.unet)} == {torch.float32}
    assert len({sheet.tobytes() for sheet in sheets}) == 3
    verify_adapter(save_adapter(pipeline.unet, tmp_path, {}), base)


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
def test_each_option_changes_the_training_and_it_still_learns(
    base: Path, caches: Caches, plain: list[torch.Tensor], option: dict[str, object]
) -> None:
    result, unet = run(base, caches, **option)
    assert result.val_loss < result.base_val_loss
    assert len(weights(unet)) != len(plain) or not equal(weights(unet), plain)


def test_a_cache_of_several_sizes_trains(base: Path, bucketed: Caches) -> None:
    assert len(set(bucketed[0].sizes)) > 1
    result, _ = run(base, bucketed)
    assert result.val_loss < result.base_val_loss
    alone, _ = run(base, bucketed, accumulation=4)  # batches of one image, so never of two sizes
    assert result.val_loss == pytest.approx(alone.val_loss, abs=1e-4)


def test_8_bit_adam_without_bitsandbytes_is_a_plain_sentence(
    base: Path, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(BestiaryError, match=r"needs bitsandbytes: pip install 'bestiary\[adamw8bit\]'"):
        run(base, caches, optimizer="adamw8bit")


def test_8_bit_adam_learns_and_resumes(base: Path, caches: Caches, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = replace(SETTINGS, steps=12, optimizer="adamw8bit", rank=64, alpha=64, learning_rate=1e-3)

    class KilledHereError(Exception):
        pass

    def die(step: int) -> None:
        if step == 8:
            raise KilledHereError

    whole, resumed = load_unet(base), load_unet(base)
    result = train(whole, load_scheduler(base), *caches, settings)
    assert result.val_loss < result.base_val_loss
    with pytest.raises(KilledHereError):
        train(load_unet(base), load_scheduler(base), *caches, settings, on_validation=die, checkpoints=tmp_path)
    train(resumed, load_scheduler(base), *caches, settings, checkpoints=tmp_path)
    assert equal(weights(resumed), weights(whole))


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps how the first training in a process was compiled, and PyTorch what it compiled."""
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
def test_a_compiled_training_is_the_same_training(base: Path, caches: Caches) -> None:
    how = {"steps": 2, "validate_every": 2, "batch_size": 3}  # 6 images to validate on: one shape for everything
    plain, _ = run(base, caches, **how)
    AcceleratorState._reset_state(reset_partial_state=True)
    compiled, unet = run(base, caches, compile=True, **how)
    assert compiled.val_loss == pytest.approx(plain.val_loss, rel=2e-3)  # other kernels round otherwise
    assert weights(unet)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_machine_that_cannot_compile_says_so(
    base: Path, caches: Caches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(BestiaryError, match=r"torch\.compile does not work on this machine .*set it to false"):
        run(base, caches, compile=True)


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from tiny import manifests
from test_training import SETTINGS, LatentCache, load_scheduler, load_unet, replace, save_adapter, train
from bestiary.diffusion import latents as encoding

base, pictures, out = map(Path, sys.argv[2:5])
encoding.SHARD_IMAGES = 2

def work(out):
    encoding.encode_images(
        base, pictures, manifests(pictures), out / "latents", resolution=32, flip=True, batch_size=2,
        unfinished=out / "unfinished",
    )
    unet = load_unet(base)
    caches = [LatentCache.open(out / "latents", split) for split in ("train", "val")]
    settings = replace(SETTINGS, steps=24, validate_every=4, dropout=0.1)
    train(unet, load_scheduler(base), *caches, settings, checkpoints=out / "checkpoints")
    save_adapter(unet, out / "adapter", {})

for line in sys.stdin:  # a child for each folder named; its parent has used no thread yet, so a fork is safe
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work(Path(line.strip()))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_encoding_and_training_killed_at_random_end_with_the_same_bytes(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    arguments = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(base), str(pictures), str(tmp_path)]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))},
    ) as starter:
        assert starter.stdin is not None
        assert starter.stdout is not None

        def attempt(folder: Path, seconds: float | None = None) -> int:
            """Work in `folder`, killed after so many seconds of the processor's; returns the exit status."""
            starter.stdin.write(f"{folder}\n")  # type: ignore[union-attr]
            starter.stdin.flush()  # type: ignore[union-attr]
            child = int(starter.stdout.readline())  # type: ignore[union-attr]
            with suppress(psutil.NoSuchProcess):  # it may be done already
                while seconds is not None and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
                    if psutil.Process(child).cpu_times().user >= seconds:
                        os.kill(child, signal.SIGKILL)
                        break
                    time.sleep(0.03)
            return int(starter.stdout.readline())  # type: ignore[union-attr]

        assert attempt(tmp_path / "whole") == 0
        random = Random(0)
        killed = 0
        while attempt(tmp_path / "killed", random.uniform(0.05, 0.4 + killed / 10)) != 0:
            killed += 1
            assert killed < 30, "it never gets on"
        starter.stdin.close()
    assert killed >= 2
    for name in ("adapter", "latents"):
        files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / name).iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "killed" / name).iterdir()} == files


TWO_PROCESSES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from tiny import manifests
from test_training import SETTINGS, LatentCache, load_scheduler, load_unet, train
from bestiary.diffusion import latents as encoding
from bestiary.diffusion.base import processes
from bestiary.diffusion.batches import TrainingStream

encoded, seen = [], []
open_rgb, image_at = encoding.open_rgb, TrainingStream.image_at
encoding.open_rgb = lambda path: (encoded.append(str(path)), open_rgb(path))[1]
TrainingStream.image_at = lambda self, position: (seen.append(position), image_at(self, position))[1]
encoding.SHARD_IMAGES = 4
base, pictures, out = map(Path, sys.argv[2:5])
how = {"resolution": 32, "flip": True, "batch_size": 4}
encoding.encode_images(base, pictures, manifests(pictures), out / "latents", **how)
caches = [LatentCache.open(out / "latents", split) for split in ("train", "val")]
settings = replace(SETTINGS, steps=15, dropout=0.0)
result = train(load_unet(base), load_scheduler(base), *caches, settings)
found = [encoded, seen, result.val_loss, result.train_loss]
(out / f"{processes().process_index}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_encode_and_train_as_one_and_see_each_image_once_an_epoch(
    base: Path, pictures: Path, caches: Caches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    # What `accelerate launch` starts on GPUs; on CPUs it would need MPI.
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2"
    subprocess.run(
        [sys.executable, *launch.split()]
        + [str(part) for part in (script, Path(__file__).parent, base, pictures, tmp_path)],
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))},
        check=True,
    )
    found = [json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1)]
    monkeypatch.setattr(encoding, "SHARD_IMAGES", 4)
    encode_images(base, pictures, manifests(pictures), tmp_path / "alone", resolution=32, flip=True, batch_size=4)
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "latents" / path.name).read_bytes()
    images = [len(encoded) for encoded, *_ in found]
    assert len(set(found[0][0] + found[1][0])) == sum(images) == 21  # each image by one of them,
    assert min(images) >= 9  # and neither idle
    alone, _ = run(base, caches, steps=15)
    for _, _, val_loss, train_loss in found:
        assert val_loss == pytest.approx(alone.val_loss, abs=1e-5)
        assert train_loss == pytest.approx(alone.train_loss, abs=1e-5)
    assert sorted(found[0][1] + found[1][1]) == list(range(60))  # positions of the run: four epochs of 15 images
    assert len(found[0][1]) == len(found[1][1])


STABLE_DIFFUSION_STEP = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_training import one_stable_diffusion_step
print(one_stable_diffusion_step().peak_memory_mib)
"""


def one_stable_diffusion_step() -> TrainingResult:
    import pandas as pd
    from diffusers import DDPMScheduler

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).requires_grad_(False)
    cache = LatentCache(
        images=pd.DataFrame({"path": ["zebra/0.jpg"], "class": ["zebra"], "sha256": ["0"]}),
        captions=pd.DataFrame({"class": ["", "zebra"], "caption": ["", "a zebra"]}),
        features=torch.randn(2, 77, 768),
        scaling_factor=0.18215,
        base_sha256="",
        data_sha256="",
        shards=[{"mean": torch.randn(1, 1, 4, 32, 32), "std": torch.ones(1, 1, 4, 32, 32)}],
    )
    settings = replace(SETTINGS, steps=1, batch_size=1, alpha=16, gradient_checkpointing=True)
    return train(unet, DDPMScheduler(beta_schedule="scaled_linear"), cache, cache, settings)


@pytest.mark.slow
def test_one_step_at_the_size_of_stable_diffusion_fits_in_8_gib() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STABLE_DIFFUSION_STEP, str(Path(__file__).parent)],
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30)),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    assert float(done.stdout.splitlines()[-1]) < 8 * 1024
