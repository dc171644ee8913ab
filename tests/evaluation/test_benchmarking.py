import time
from pathlib import Path

import numpy as np
import pytest

from bestiary.diffusion.adapter import apply_adapter
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.evaluation import benchmarking
from bestiary.evaluation.benchmarking import Setting
from bestiary.evaluation.judge import Judge

PROMPTS = ["a photo of a tiger", "a photo of an antelope"]


def test_the_grid_holds_the_default_fused_and_not_and_every_combination_once() -> None:
    default = Setting("ddim", 10, batch=1, fused=True)
    settings = benchmarking.grid(["ddim", "unipc"], [5, 10], [1], default)
    assert settings[:2] == [Setting("ddim", 10, 1, fused=False), default]
    assert len(settings) == len(set(settings)) == 5


def test_each_setting_gives_a_row_with_its_cost_and_its_quality(pipeline, adapter: Path, judge: Judge) -> None:
    settings = [
        Setting("ddim", 2, 1, fused=True),
        Setting("ddpm", 1, 2, fused=True),
        Setting("ddim", 2, 1, fused=False),
    ]
    rows = benchmarking.run(pipeline, adapter, judge, settings, PROMPTS, guidance_scale=3.0, repeats=2, seed=0)
    by_setting = {(row["scheduler"], row["fused"]): row for row in rows}
    assert len(by_setting) == 3
    for row in rows:
        assert 0 < row["text_s"] + row["denoise_s"] + row["decode_s"] < 2 * row["p50_s"]
        assert row["p50_s"] <= row["p95_s"]
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["p50_s"])
        assert row["peak_memory_mib"] > 50
        assert -100 <= row["quality"] <= 100
    assert by_setting["ddim", True]["distance_to_converged"] > 0
    assert by_setting["ddpm", True]["distance_to_converged"] is None
    # The same pictures, whether the adapter is beside the base's weights or in them.
    assert by_setting["ddim", True]["quality"] == pytest.approx(by_setting["ddim", False]["quality"], abs=0.5)


def test_a_fused_adapter_draws_what_it_draws_beside_the_base(pipeline, adapter: Path) -> None:
    def draw():
        how = {"steps": 2, "guidance_scale": 3.0, "scheduler": "ddim", "batch_size": 2}
        return np.stack([np.asarray(image, dtype=int) for image in generate(pipeline, PROMPTS, [0, 1], **how)])

    plain = draw()
    apply_adapter(pipeline, adapter)
    beside = draw()
    benchmarking.fuse(pipeline)
    fused = draw()
    assert np.abs(beside - plain).max() > 2
    assert np.abs(fused - beside).max() <= 2


def test_time_is_split_into_text_denoising_and_decoding(pipeline) -> None:
    slow = pipeline.unet.register_forward_hook(lambda *_: time.sleep(0.2))
    with benchmarking.stopwatch(pipeline) as lap:
        generate(pipeline, PROMPTS[:1], [0], steps=3, guidance_scale=3.0, scheduler="ddim", batch_size=1)
    slow.remove()
    assert lap["denoise"] > 0.4
    assert lap["text"] > 0
    assert lap["decode"] > 0
    assert lap["text"] + lap["denoise"] + lap["decode"] <= lap["total"]


@pytest.mark.slow
def test_a_cold_start_is_measured_in_a_process_of_its_own(base_folder: Path, adapter: Path) -> None:
    seconds = benchmarking.cold_start(
        str(base_folder), None, adapter, PROMPTS[0], scheduler="ddim", steps=1, guidance_scale=3.0
    )
    parts = [seconds[part] for part in ("import_s", "load_s", "first_picture_s")]
    assert min(parts) > 0
    assert sum(parts) < seconds["total_s"]


@pytest.mark.slow
def test_a_cold_start_that_fails_says_why_in_one_sentence(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(BestiaryError, match=r"cannot be drawn in a process of its own: .*does not exist"):
        benchmarking.cold_start(str(tmp_path / "x"), None, adapter, "", scheduler="ddim", steps=1, guidance_scale=3.0)


def test_the_fastest_good_setting_is_the_fastest_within_a_hundredth_of_the_best() -> None:
    rows = [
        {"quality": 30.0, "images_per_second": 1.0},
        {"quality": 29.8, "images_per_second": 4.0},
        {"quality": 29.0, "images_per_second": 9.0},
    ]
    assert benchmarking.fastest_good(rows) == rows[1]


def test_the_environment_names_what_the_numbers_depend_on(pipeline) -> None:
    environment = benchmarking.environment(pipeline)
    assert environment["dtype"] == "float32"
    assert environment["threads"] >= 1
    assert {"device", "torch", "diffusers", "python"} <= set(environment)
