import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bestiary.diffusion.adapter import apply_adapter
from bestiary.diffusion.base import load_pipeline
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.evaluation import benchmarking
from bestiary.evaluation.benchmarking import Setting, Trial
from bestiary.evaluation.judge import Judge

PROMPTS = ["a photo of an antelope", "a photo of a tiger"]


@pytest.fixture
def trial(judge: Judge) -> Trial:
    return Trial.of(judge, ["antelope", "tiger"], "a photo of {}", count=2, seed=0)


def test_the_grid_holds_the_default_fused_and_not_its_variants_and_every_combination_once() -> None:
    default = Setting("ddim", 10, batch=1, fused=False)
    settings = benchmarking.grid(["ddim", "unipc"], [5, 10], [1], default, guidance=["always", "never"], vae=["tiny"])
    assert settings[:2] == [default, replace(default, fused=True)]
    assert {replace(default, guidance="never"), replace(default, vae="tiny")} < set(settings)
    assert len(settings) == len(set(settings)) == 7


@pytest.mark.slow
def test_each_setting_gives_a_row_with_its_cost_and_its_quality(base_folder: Path, adapter: Path, trial: Trial) -> None:
    default = Setting("ddim", 2, 1, fused=True)
    settings = [
        default,
        replace(default, fused=False),
        replace(default, guidance="never"),
        replace(default, guidance="interval"),
        replace(default, vae="tiny"),
        Setting("ddpm", 1, 2, fused=True),
        replace(default, scheduler="lcm"),
    ]
    rows, skipped = benchmarking.run(
        lambda dtype: load_pipeline(base_folder, device="cpu", dtype=getattr(torch, dtype)),
        adapter,
        trial,
        settings,
        guidance_scale=3.0,
        guidance_interval=[0.5, 5.0],
        repeats=2,
        quality_batch=2,
        tiny_vae=tiny_vae,
    )
    assert [row["reason"] for row in skipped] == ["the base is no latent consistency model"]
    fused, beside, never, interval, tiny, ddpm = rows
    for row, setting in zip(rows, settings, strict=False):
        assert asdict(setting).items() <= row.items()
        assert 0 < row["text_s"] + row["denoise_s"] + row["decode_s"] < 2 * row["p50_s"]
        assert row["p50_s"] <= row["p95_s"]
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["p50_s"])
        assert row["peak_memory_mib"] > 50
        assert -100 <= row["quality"] <= 100
        assert row["top1"] in (0, 50, 100)
    assert ddpm["distance_to_converged"] is None
    # The same pictures, whether the adapter is beside the base's weights or in them.
    assert fused["quality"] == pytest.approx(beside["quality"], abs=0.5)
    distances = [row["distance_to_converged"] for row in (fused, never, interval, tiny)]
    assert min(distances) > 0
    assert len(set(distances)) == 4


def test_the_quality_is_of_all_pictures_at_their_size_even_when_fewer_were_timed(
    base_folder: Path, adapter: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[list[tuple[int, int]]] = []
    honest = benchmarking.quality

    def count(images, *others):
        judged.append([image.size for image in images.values()])
        return honest(images, *others)

    monkeypatch.setattr(benchmarking, "quality", count)
    three = replace(trial, prompts=[*PROMPTS, PROMPTS[0]], labels=[0, 1, 0], seeds=[0, 1, 2])
    how = {"guidance_scale": 3.0, "guidance_interval": [0.5, 5.0], "repeats": 1, "quality_batch": 4, "resolution": 32}
    benchmarking.run(
        lambda _: load_pipeline(base_folder, device="cpu"), adapter, three, [Setting("ddim", 1, 1, fused=True)], **how
    )
    assert judged == [[(32, 32)] * 3]


def test_a_latent_consistency_model_is_measured_and_converges_to_nothing(
    base_folder: Path, adapter: Path, trial: Trial
) -> None:
    def load(_dtype: str):
        pipeline = load_pipeline(base_folder, device="cpu")
        torch.manual_seed(0)
        pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, time_cond_proj_dim=16).eval()
        return pipeline

    default = Setting("lcm", 1, 1, fused=True)
    settings = [default, replace(default, guidance="interval"), replace(default, steps=100)]
    how = {"guidance_scale": 3.0, "guidance_interval": [0.5, 5.0], "repeats": 1, "quality_batch": 2, "resolution": 32}
    (row,), skipped = benchmarking.run(load, adapter, trial, settings, **how)
    assert row["distance_to_converged"] is None
    assert row["denoise_s"] > 0
    assert [setting["reason"] for setting in skipped] == [
        "a latent consistency model cannot be guided at some steps only",
        "a latent consistency model takes at most 50 steps",
    ]


@pytest.mark.slow
def test_a_compiled_setting_draws_what_the_others_draw_and_says_what_compiling_took(
    base_folder: Path, adapter: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # all of it but the C++
    torch._dynamo.reset()
    default = Setting("ddim", 1, 1, fused=True)
    (plain, compiled), skipped = benchmarking.run(
        lambda _: load_pipeline(base_folder, device="cpu"),
        adapter,
        trial,
        [default, replace(default, compiled=True)],
        guidance_scale=3.0,
        guidance_interval=[0.5, 5.0],
        repeats=2,
        quality_batch=2,
        resolution=32,
    )
    assert not skipped
    assert compiled["compile_s"] > compiled["denoise_s"] > 0
    assert compiled["quality"] == pytest.approx(plain["quality"], abs=0.1)
    assert "compile_s" not in plain


def tiny_vae(pipeline):
    """A decoder of a few random weights for the embedded base's latents."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(
        latent_channels=pipeline.unet.config.in_channels,
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )


def test_a_tiny_vae_is_loaded_or_refused_in_one_sentence(pipeline, tmp_path: Path) -> None:
    tiny_vae(pipeline).save_pretrained(tmp_path / "tiny")
    assert benchmarking.load_tiny_vae(str(tmp_path / "tiny"), None, pipeline).dtype == torch.float32
    with pytest.raises(BestiaryError, match=r"^The tiny VAE '.*missing' cannot be loaded: .+\.$"):
        benchmarking.load_tiny_vae(str(tmp_path / "missing"), None, pipeline)
    pipeline.unet.register_to_config(in_channels=5)
    with pytest.raises(BestiaryError, match="and the base has 5"):
        benchmarking.load_tiny_vae(str(tmp_path / "tiny"), None, pipeline)


def test_what_this_machine_or_base_cannot_do_is_skipped_with_a_reason(
    pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = Setting("ddim", 2, 1, fused=True)
    monkeypatch.setattr(benchmarking.shutil, "which", lambda _: None)
    monkeypatch.setattr(benchmarking, "_cpu", lambda _: "sse2 avx")
    reasons = [
        benchmarking.reason_to_skip(replace(default, **change), pipeline)
        for change in (
            {},
            {"scheduler": "lcm"},
            {"dtype": "float16"},
            {"dtype": "bfloat16"},
            {"compiled": True},
        )
    ]
    assert reasons == [
        None,
        "the base is no latent consistency model",
        "a CPU does not compute in float16",
        "this CPU has no instructions for bfloat16",
        "torch.compile needs a C++ compiler",
    ]
    pipeline.unet.register_to_config(time_cond_proj_dim=32)
    assert benchmarking.reason_to_skip(replace(default, scheduler="lcm"), pipeline) is None
    assert "at most 50 steps" in str(
        benchmarking.reason_to_skip(replace(default, scheduler="lcm", steps=100), pipeline)
    )
    assert "guided at some steps" in str(benchmarking.reason_to_skip(replace(default, guidance="interval"), pipeline))


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


def test_the_environment_names_what_the_numbers_depend_on() -> None:
    environment = benchmarking.environment()
    assert environment["dtype"] in ("float32", "bfloat16", "float16")
    assert environment["threads"] >= 1
    assert {"device", "torch", "diffusers", "python"} <= set(environment)
