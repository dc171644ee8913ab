from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL.Image import Image

from bestiary.diffusion.adapter import apply_adapter
from bestiary.diffusion.base import load_pipeline
from bestiary.diffusion.decoders import load_tiny_decoder
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.evaluation import benchmark
from bestiary.evaluation.benchmark import Bench, Quality, Row, Setting, Trial, default_setting, reason_to_skip
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.pictures import Jobs
from bestiary.evaluation.profiling import Cost, Machine
from bestiary.params import Benchmark, Evaluate, load_params
from bestiary.samplers import Sampling

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, StableDiffusionPipeline

ROOT = Path(__file__).parents[2]
PROMPTS = ["a photo of an antelope", "a photo of a tiger"]
GUIDED = Sampling(guidance_scale=3.0, guidance_interval=(0.5, 5.0))
SMALL = replace(GUIDED, width=32, height=32)
CAPABLE = Machine("cpu", has_bfloat16=True, can_compile=True)


@pytest.fixture
def trial(judge: Judge) -> Trial:
    return Trial.of(judge, ["antelope", "tiger"], "a photo of {}", count=2, seed=0)


@pytest.fixture
def bench(base_folder: Path, adapter: Path, trial: Trial) -> Bench:
    """A benchmark of two pictures of 32 pixels a side, with one timed call for each setting."""

    def load(dtype: str) -> StableDiffusionPipeline:
        return load_pipeline(base_folder, device="cpu", dtype=getattr(torch, dtype))

    return Bench(load, adapter, trial, SMALL, repeats=1, untimed_batch=2)


def tiny_vae(pipeline: StableDiffusionPipeline) -> AutoencoderTiny:
    """A decoder with few and random weights for the bundled base's latents."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(
        latent_channels=pipeline.unet.config.in_channels,
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )


def settings(**changes: object) -> tuple[Benchmark, Evaluate]:
    """The sample profile's settings of both sections, with changes to `benchmark`."""
    params = load_params(ROOT / "params.yaml")
    return params.benchmark.model_copy(update=changes), params.evaluate


def test_the_plan_holds_the_default_its_variants_and_every_combination_once() -> None:
    section, evaluate = settings(
        schedulers=["ddim", "unipc"],
        steps=[5, 10],
        batch_sizes=[1],
        guidance=["always", "never"],
        dtypes=[],
        compile=[],
    )
    evaluate = evaluate.model_copy(update={"scheduler": "ddim", "steps": 10, "guidance_interval": None})
    planned = benchmark.plan(section, default_setting(evaluate), tiny_decoder=True)
    default = Setting("ddim", 10, batch=1, fused=False)
    assert planned[:2] == [default, replace(default, fused=True)]
    assert {replace(default, guidance="never"), replace(default, vae="tiny")} < set(planned)
    assert len(planned) == len(set(planned)) == 7


def test_the_plan_guides_the_default_as_the_evaluation_does_and_varies_dtype_and_compiling() -> None:
    section, evaluate = settings(schedulers=["ddim"], steps=[5], dtypes=["bfloat16"], compile=[True])
    default = default_setting(evaluate.model_copy(update={"guidance_interval": (2.0, 9.0)}), "float16")
    assert (default.guidance, default.dtype, default.batch, default.fused) == ("interval", "float16", 1, False)
    planned = benchmark.plan(section, default)
    assert planned[0] == default
    assert replace(default, dtype="bfloat16") in planned
    assert replace(default, compiled=True) in planned


@pytest.mark.slow
def test_each_setting_gives_a_row_with_its_cost_and_its_quality(bench: Bench) -> None:
    default = Setting("ddim", 2, 1, fused=True)
    planned = [
        default,
        replace(default, fused=False),
        replace(default, guidance="never"),
        replace(default, guidance="interval"),
        replace(default, vae="tiny"),
        Setting("ddpm", 1, 2, fused=True),
        replace(default, scheduler="lcm"),
    ]
    rows, skipped = benchmark.run(replace(bench, sampling=GUIDED, repeats=2, load_tiny_decoder=tiny_vae), planned)
    assert [each.to_dict() for each in skipped] == [
        {**asdict(planned[-1]), "reason": "the base is not a latent consistency model"}
    ]
    fused, unfused, never, interval, tiny, ddpm = rows
    for row, setting in zip(rows, planned, strict=False):
        assert row.setting == setting
        assert 0 < row.cost.text_s + row.cost.denoise_s + row.cost.decode_s < 2 * row.cost.p50_s
        assert row.cost.p50_s <= row.cost.p95_s
        assert row.cost.images_per_second == pytest.approx(setting.batch / row.cost.p50_s)
        assert row.cost.peak_memory_mib > 50
        assert -100 <= row.quality.quality <= 100
        assert row.quality.top1 in (0, 50, 100)
    assert ddpm.quality.distance_to_converged is None
    # The pictures are the same whether the adapter is applied to the base's weights or fused into them.
    assert fused.quality.quality == pytest.approx(unfused.quality.quality, abs=0.5)
    distances = [row.quality.distance_to_converged for row in (fused, never, interval, tiny)]
    assert all(distance and distance > 0 for distance in distances)
    assert len(set(distances)) == 4


def test_a_row_is_written_flat_without_what_was_not_measured() -> None:
    cost = Cost(2.0, 3.0, 0.5, 0.1, 1.5, 0.2, 900.0, peak_device_memory_mib=None)
    row = Row(Setting("ddim", 2, batch=1, fused=True), cost, Quality(30.0, 50.0, distance_to_converged=None))
    assert list(row.to_dict().items()) == [
        ("scheduler", "ddim"),
        ("steps", 2),
        ("batch", 1),
        ("fused", True),
        ("guidance", "always"),
        ("dtype", "float32"),
        ("compiled", False),
        ("vae", "full"),
        ("p50_s", 2.0),
        ("p95_s", 3.0),
        ("images_per_second", 0.5),
        ("text_s", 0.1),
        ("denoise_s", 1.5),
        ("decode_s", 0.2),
        ("peak_memory_mib", 900.0),
        ("quality", 30.0),
        ("top1", 50.0),
        ("distance_to_converged", None),
    ]
    measured = replace(row, cost=replace(cost, peak_device_memory_mib=70.0), compile_s=9.0, with_loading_s=4.0)
    assert measured.to_dict() == {
        **row.to_dict(),
        "peak_device_memory_mib": 70.0,
        "compile_s": 9.0,
        "with_loading_s": 4.0,
    }


class RecordingJudge(Judge):
    """A judge that records the sizes of the pictures that it sees."""

    def __init__(self, judge: Judge) -> None:
        super().__init__(judge.model, judge.tokenizer, judge.image_processor)
        self.sizes: list[list[tuple[int, int]]] = []

    def image_features(self, images: Sequence[Image]) -> torch.Tensor:
        self.sizes.append([image.size for image in images])
        return super().image_features(images)


def test_all_pictures_are_judged_at_their_size_even_when_fewer_were_timed(bench: Bench) -> None:
    judge = RecordingJudge(bench.trial.judge)
    three = replace(bench.trial, judge=judge, jobs=Jobs([0, 1, 0], [*PROMPTS, PROMPTS[0]], [0, 1, 2]))
    benchmark.run(replace(bench, trial=three, untimed_batch=4), [Setting("ddim", 1, 1, fused=True)])
    assert judge.sizes == [[(32, 32)] * 3]


def test_timed_calls_start_over_when_the_pictures_run_out(pipeline: StableDiffusionPipeline) -> None:
    jobs = Jobs([0, 1], PROMPTS, [0, 1])
    sampling = replace(SMALL, sampler="ddim", steps=1, guidance_interval=None)
    cost, images = benchmark.draw_timed(pipeline, jobs, sampling, batch=3, repeats=1)
    assert sorted(images) == [0, 1]
    assert cost.images_per_second == pytest.approx(3 / cost.p50_s)


def test_a_latent_consistency_model_is_measured_without_a_converged_picture(bench: Bench) -> None:
    def load(dtype: str) -> StableDiffusionPipeline:
        pipeline = bench.load(dtype)
        torch.manual_seed(0)
        pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, time_cond_proj_dim=16).eval()
        return pipeline

    default = Setting("lcm", 1, 1, fused=True)
    planned = [default, replace(default, guidance="interval"), replace(default, steps=100)]
    (row,), skipped = benchmark.run(replace(bench, load=load), planned)
    assert row.quality.distance_to_converged is None
    assert row.cost.denoise_s > 0
    assert [each.setting for each in skipped] == planned[1:]
    assert ["only some steps" in each.reason for each in skipped] == [True, False]
    assert "at most 50 steps" in skipped[1].reason


def test_a_benchmark_of_which_nothing_can_run_names_the_reason(bench: Bench) -> None:
    with pytest.raises(BestiaryError, match="latent consistency model"):
        benchmark.run(bench, [Setting("lcm", 1, 1, fused=True)])


@pytest.mark.slow
def test_a_compiled_setting_draws_the_same_and_reports_the_seconds_of_compiling(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # everything except the C++ compiler
    torch._dynamo.reset()
    default = Setting("ddim", 1, 1, fused=True)
    (plain, compiled), skipped = benchmark.run(replace(bench, repeats=2), [default, replace(default, compiled=True)])
    assert not skipped
    assert compiled.compile_s is not None
    assert compiled.compile_s > compiled.cost.denoise_s > 0
    assert compiled.quality.quality == pytest.approx(plain.quality.quality, abs=0.1)
    assert plain.compile_s is None


def test_every_picture_of_a_compiled_setting_is_drawn_in_batches_of_one_shape(
    bench: Bench, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []

    def seen(unet: torch.nn.Module) -> torch.nn.Module:
        unet.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        return unet

    monkeypatch.setattr(benchmark, "this_machine", lambda _: CAPABLE)
    monkeypatch.setattr(torch, "compile", seen)
    trial = Trial.of(judge, ["antelope", "tiger"], "a photo of {}", count=5, seed=0)
    setting = Setting("ddim", 1, batch=2, fused=False, compiled=True, guidance="always")
    (row,), _ = benchmark.run(replace(bench, trial=trial, untimed_batch=3), [setting])
    assert row.quality.distance_to_converged is not None  # each picture has one to compare with
    assert {shape[0] for shape in shapes} == {4}


def test_a_tiny_vae_is_loaded_or_refused_by_name(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    tiny_vae(pipeline).save_pretrained(tmp_path / "tiny")
    assert load_tiny_decoder(str(tmp_path / "tiny"), None, pipeline).dtype == torch.float32
    with pytest.raises(BestiaryError, match=r"tiny_decoder.*missing"):
        load_tiny_decoder(str(tmp_path / "missing"), None, pipeline)
    pipeline.unet.register_to_config(in_channels=5)
    with pytest.raises(BestiaryError, match=r"tiny_decoder.*tiny. decodes.* 5\b"):
        load_tiny_decoder(str(tmp_path / "tiny"), None, pipeline)


def test_settings_that_the_machine_cannot_run_are_skipped_with_a_reason(pipeline: StableDiffusionPipeline) -> None:
    default = Setting("ddim", 2, 1, fused=True)
    incapable = Machine("cpu", has_bfloat16=False, can_compile=False)
    half, brain, compiled = (
        replace(default, dtype="float16"),
        replace(default, dtype="bfloat16"),
        replace(default, compiled=True),
    )
    assert [reason_to_skip(setting, pipeline, incapable) for setting in (default, half, brain, compiled)] == [
        None,
        "a CPU does not compute in float16",
        "this CPU has no instructions for bfloat16",
        "torch.compile needs a C++ compiler",
    ]
    assert [reason_to_skip(setting, pipeline, CAPABLE) for setting in (brain, compiled)] == [None, None]
    gpu = replace(incapable, device_type="cuda")
    assert [reason_to_skip(setting, pipeline, gpu) for setting in (half, brain, compiled)] == [
        None,
        "this GPU has no instructions for bfloat16",
        "torch.compile needs triton",
    ]


def test_settings_that_the_base_cannot_run_are_skipped_with_a_reason(pipeline: StableDiffusionPipeline) -> None:
    default = Setting("ddim", 2, 1, fused=True)
    lcm = replace(default, scheduler="lcm")
    assert reason_to_skip(lcm, pipeline, CAPABLE) == "the base is not a latent consistency model"
    pipeline.unet.register_to_config(time_cond_proj_dim=32)
    assert reason_to_skip(lcm, pipeline, CAPABLE) is None
    assert "at most 50 steps" in str(reason_to_skip(replace(lcm, steps=100), pipeline, CAPABLE))
    assert "only some steps" in str(reason_to_skip(replace(default, guidance="interval"), pipeline, CAPABLE))


def test_a_fused_adapter_draws_what_an_applied_adapter_draws(pipeline: StableDiffusionPipeline, adapter: Path) -> None:
    def draw() -> np.ndarray:
        images = generate(pipeline, PROMPTS, [0, 1], Sampling("ddim", steps=2, guidance_scale=3.0), batch_size=2)
        return np.stack([np.asarray(image, dtype=int) for image in images])

    plain = draw()
    apply_adapter(pipeline, adapter)
    applied = draw()
    benchmark.fuse(pipeline)
    fused = draw()
    assert np.abs(applied - plain).max() > 2
    assert np.abs(fused - applied).max() <= 2


def test_the_fastest_good_setting_is_the_fastest_within_a_hundredth_of_the_best() -> None:
    def row(quality: float, images_per_second: float) -> Row:
        cost = Cost(1.0, 1.0, images_per_second, 0.1, 0.8, 0.1, 900.0, None)
        return Row(Setting("ddim", 2, batch=1, fused=True), cost, Quality(quality, 50.0, None))

    rows = [row(30.0, 1.0), row(29.8, 4.0), row(29.0, 9.0)]
    assert benchmark.fastest_good(rows) == rows[1]


def test_a_setting_that_compiles_too_long_or_does_not_fit_is_skipped_and_the_others_are_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = benchmark._measure_setting

    def compile_for_ever(unet: torch.nn.Module) -> torch.nn.Module:
        unet.register_forward_pre_hook(lambda *_: time.sleep(60))
        return unet

    def full(bench: Bench, pipeline: StableDiffusionPipeline, setting: Setting, converged: object) -> benchmark.Row:
        if setting.batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(bench, pipeline, setting, None)

    monkeypatch.setattr(benchmark, "this_machine", lambda _: CAPABLE)
    monkeypatch.setattr(benchmark, "_draw_converged", lambda *_: {})
    monkeypatch.setattr(benchmark, "_measure_setting", full)
    monkeypatch.setattr(benchmark, "COMPILE_LIMIT_SECONDS", 0.1)
    monkeypatch.setattr(torch, "compile", compile_for_ever)
    default = Setting("ddim", 1, batch=1, fused=False)
    rows, skipped = benchmark.run(bench, [default, replace(default, batch=2), replace(default, compiled=True)])
    assert [row.setting for row in rows] == [default]
    reasons = {each.setting.batch: each.reason for each in skipped}
    assert reasons == {2: "the GPU's memory is too small", 1: "compiling takes more than 0 s"}


def test_a_setting_that_does_not_compile_is_skipped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(unet: torch.nn.Module) -> torch.nn.Module:
        def fail(*_: object) -> None:
            raise RuntimeError("no ptxas")

        unet.register_forward_pre_hook(fail)
        return unet

    monkeypatch.setattr(benchmark, "this_machine", lambda _: CAPABLE)
    monkeypatch.setattr(torch, "compile", broken)
    default = Setting("ddim", 1, batch=1, fused=False)
    rows, skipped = benchmark.run(bench, [default, replace(default, compiled=True)])
    assert [row.setting for row in rows] == [default]
    assert [each.reason for each in skipped] == ["torch.compile does not work on this machine (RuntimeError)"]


def test_what_fails_after_compiling_is_not_called_a_compilers_failure(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(benchmark, "this_machine", lambda _: CAPABLE)
    monkeypatch.setattr(torch, "compile", lambda unet: unet)
    monkeypatch.setattr(benchmark, "judge_quality", full)
    with pytest.raises(OSError, match="No space left"):
        benchmark.run(bench, [Setting("ddim", 1, batch=1, fused=False, compiled=True)])


def test_pictures_that_are_only_judged_are_drawn_in_halves_when_they_do_not_fit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The converged pictures and those that no timed call draws. The memory of a GPU is replaced."""
    draw, sizes = benchmark._draw, []

    def small(pipeline: StableDiffusionPipeline, jobs: Jobs, *rest: Any) -> Any:
        sizes.append(len(jobs.seeds))
        if len(jobs.seeds) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw(pipeline, jobs, *rest)

    monkeypatch.setattr(benchmark, "_draw", small)
    (row,), skipped = benchmark.run(bench, [Setting("ddim", 1, batch=1, fused=False)])
    assert not skipped
    assert row.quality.distance_to_converged is not None
    assert sizes.count(2) == 1  # it does not try again
    assert "Lower evaluate.batch_size" in capsys.readouterr().out
