import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import CLASSES, manifests
from diffusers import UNet2DConditionModel

from bestiary.diffusion.adapter import save_adapter, verify_adapter
from bestiary.diffusion.base import load_pipeline, load_scheduler, load_unet
from bestiary.diffusion.latents import LatentCache, encode_images
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.training import Ema, TrainingResult, TrainingSettings, learning_rate_factor, train
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
    steps=12,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=2,
    validate_every=5,
    seed=0,
)


def run(base: Path, caches: Caches, **changes: object) -> tuple[TrainingResult, UNet2DConditionModel]:
    unet = load_unet(base)
    return train(unet, load_scheduler(base), *caches, replace(SETTINGS, **changes)), unet  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain(base: Path, latents: Path) -> list[torch.Tensor]:
    """The adapter that SETTINGS give."""
    return weights(run(base, (LatentCache.open(latents, "train"), LatentCache.open(latents, "val")))[1])


def weights(unet: UNet2DConditionModel) -> list[torch.Tensor]:
    return [value.clone() for name, value in unet.state_dict().items() if "lora" in name]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_training_lowers_the_validation_loss_and_its_adapter_is_verified(
    prediction_type: str, base: Path, v_prediction_base: Path, caches: Caches, tmp_path: Path
) -> None:
    chosen = base if prediction_type == "epsilon" else v_prediction_base
    result, unet = run(chosen, caches, steps=40, validate_every=20)
    assert result.val_loss < result.base_val_loss
    assert result.best_step in (20, 40)
    assert verify_adapter(save_adapter(unet, tmp_path, {}), chosen).rank == 2


def test_the_report_has_the_promised_numbers_all_finite(base: Path, caches: Caches) -> None:
    result, _ = run(base, caches)
    report = result.report()
    promised = "steps best_step train_loss val_loss images_per_second peak_memory_mib trainable_parameters seconds"
    assert set(promised.split()) <= report.keys()
    assert all(math.isfinite(value) for value in report.values())
    assert result.steps == 12
    assert set(result.val_loss_by_class) == set(CLASSES)


def test_the_history_has_a_row_for_each_validation_and_each_tenth_step(base: Path, caches: Caches) -> None:
    result, _ = run(base, caches, steps=23, validate_every=10)
    assert [row["step"] for row in result.history] == [0, 10, 20, 23]
    assert [round(row["epoch"], 2) for row in result.history] == [0, 2.67, 5.33, 6.13]
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
    plain, checkpointed = (run(base, caches, gradient_checkpointing=on)[0] for on in (False, True))
    assert checkpointed.val_loss == pytest.approx(plain.val_loss, rel=1e-5)


def test_the_moving_average_is_what_is_validated_and_kept(base: Path, caches: Caches) -> None:
    # An average that hardly moves stays near the base; the trained weights do not.
    slow, fast = (run(base, caches, ema_decay=decay, steps=40, validate_every=40)[0] for decay in (0.999, 0.0))
    assert fast.val_loss < slow.val_loss < slow.base_val_loss


def test_the_best_step_is_kept_not_the_last(base: Path, caches: Caches) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    unet = load_unet(base)
    settings = replace(
        SETTINGS, steps=30, validate_every=5, learning_rate=0.3, ema_decay=0.0, learning_rate_schedule="constant"
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
    assert len(outputs) == 4
    assert not torch.allclose(outputs[-1], expected)


def test_the_gradient_norm_is_logged_before_clipping(base: Path, caches: Caches) -> None:
    result, _ = run(base, caches, max_grad_norm=1e-6)
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


@pytest.mark.parametrize("step", [3, 10, 17])
def test_a_training_killed_at_any_step_ends_with_the_same_adapter(
    base: Path, caches: Caches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr("bestiary.diffusion.training.CHECKPOINT_SECONDS", 0.0)
    settings = replace(SETTINGS, steps=23, validate_every=6, dropout=0.1, accumulation=2)
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
    update = Ema.update

    def die(self: Ema, now: int) -> None:
        if now == step:
            raise KilledError
        update(self, now)

    monkeypatch.setattr(Ema, "update", die)
    with pytest.raises(KilledError):
        trained(tmp_path / "checkpoints")
    monkeypatch.setattr(Ema, "update", update)
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
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    unet, settings = load_unet(base), replace(SETTINGS, steps=11)
    with pytest.raises(BestiaryError, match=r"stop \(SIGTERM\) and did so after step 5 of 11: .* same command goes on"):
        train(unet, load_scheduler(base), *caches, settings, on_validation=terminate, checkpoints=tmp_path)
    resumed, whole = load_unet(base), load_unet(base)
    train(resumed, load_scheduler(base), *caches, settings, checkpoints=tmp_path)
    train(whole, load_scheduler(base), *caches, settings)
    assert equal(weights(resumed), weights(whole))


def test_training_ends_when_nothing_has_improved_for_a_while(base: Path, caches: Caches) -> None:
    result, _ = run(base, caches, steps=40, validate_every=5, patience=2, min_delta=10.0)
    assert (result.steps, result.best_step) == (15, 5)


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
    assert len({sheet.tobytes() for sheet in sheets}) == 4
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


TWO_PROCESSES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from test_training import SETTINGS, LatentCache, load_scheduler, load_unet, train
from bestiary.diffusion.batches import TrainingStream

seen = []
image_at = TrainingStream.image_at
TrainingStream.image_at = lambda self, position: (seen.append(position), image_at(self, position))[1]
base, latents, out = map(Path, sys.argv[2:5])
caches = [LatentCache.open(latents, split) for split in ("train", "val")]
settings = replace(SETTINGS, steps=15, dropout=0.0)
result = train(load_unet(base), load_scheduler(base), *caches, settings)
from accelerate import PartialState
(out / f"{PartialState().process_index}.json").write_text(json.dumps([result.val_loss, result.train_loss, seen]))
"""


@pytest.mark.slow
def test_two_processes_train_as_one_and_see_each_image_once_an_epoch(
    base: Path, latents: Path, caches: Caches, tmp_path: Path
) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2"  # what `accelerate launch` starts, too
    subprocess.run(
        [sys.executable, *launch.split()]
        + [str(part) for part in (script, Path(__file__).parent, base, latents, tmp_path)],
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path)), "ACCELERATE_USE_CPU": "true"},
        check=True,
    )
    found = [json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1)]
    alone, _ = run(base, caches, steps=15)
    for val_loss, train_loss, _ in found:
        assert val_loss == pytest.approx(alone.val_loss, abs=1e-5)
        assert train_loss == pytest.approx(alone.train_loss, abs=1e-5)
    assert sorted(found[0][2] + found[1][2]) == list(range(60))  # positions of the run: four epochs of 15 images
    assert len(found[0][2]) == len(found[1][2])


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
