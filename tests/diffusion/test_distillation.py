import json
import os
import runpy
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from support.adapters import make_adapter
from support.settings import distill_settings
from support.stages import ROOT
from support.training import adapter_weights, all_equal, stable_diffusion_cache

from bestiary.diffusion.adapter import adapter_sha256, apply_adapter, apply_adapters, save_adapter, verify_adapter
from bestiary.diffusion.adapter_format import FILE_NAME, UP, Provenance
from bestiary.diffusion.adapter_reading import read_adapter
from bestiary.diffusion.base import base_sha256, load_pipeline, load_scheduler, load_unet
from bestiary.diffusion.distillation import NoiseSchedule, TeacherPath, distill
from bestiary.diffusion.few_step_adapter import combine, find_few_step, make_teacher, sampling_of
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.merging import Parent, merge
from bestiary.diffusion.progress import TrainingResult
from bestiary.diffusion.sampling import generate, seeded
from bestiary.diffusion.stored_adapter import adapter_file
from bestiary.errors import BestiaryError
from bestiary.evaluation.sweep import write_operating_point
from bestiary.generation import defaults_of
from bestiary.params import FewStepModel, Model
from bestiary.registry.resolving import resolve
from bestiary.samplers import Sampling

TWO_STEPS = Sampling("lcm", steps=2, guidance_scale=1.0, timesteps=(999, 699))


def run_distillation(
    base: Path, latents: Latents, checkpoints: Path | None = None, **changes: object
) -> tuple[TrainingResult, list[torch.Tensor]]:
    """Distil with `distill_settings(**changes)`; returns the result and the LoRA's weights."""
    unet = load_unet(base)
    settings = distill_settings(**changes)
    result = distill(unet, load_scheduler(base), latents, settings, seed=0, checkpoints=checkpoints)
    return result, adapter_weights(unet)


@pytest.fixture(scope="module")
def plain(base: Path, latents_folder: Path) -> tuple[TrainingResult, list[torch.Tensor]]:
    return run_distillation(base, Latents.open(latents_folder))


@pytest.fixture(scope="module")
def style(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter of the base, about as strong as real ones."""
    file = make_adapter(load_unet(base), tmp_path_factory.mktemp("style"))
    content = read_adapter(file)
    weights = {key: value * 0.1 if key.endswith(UP) else value for key, value in content.weights.items()}
    origin = Provenance(base=str(base), base_sha256=base_sha256(base), data_sha256="of the images")
    file.write_bytes(replace(content, weights=weights, provenance=origin).to_bytes())
    return file.parent


@pytest.fixture(scope="module")
def few_step(base: Path, style: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few-step adapter made from the style and a LoRA that also changes convolutions."""
    folder = tmp_path_factory.mktemp("few")
    difference = make_adapter(load_unet(base), folder / "difference", seed=1, rank=3, targets=["to_q", "conv1"])
    difference.write_bytes(replace(read_adapter(difference), provenance=Provenance()).to_bytes())
    origin = read_adapter(style / FILE_NAME).provenance
    (folder / FILE_NAME).write_bytes(combine(style, difference, 1.0, TWO_STEPS, origin).to_bytes())
    return folder


# ---- distilling ----


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_distilling_brings_the_student_closer_to_where_the_teachers_path_ends(
    prediction_type: str, base: Path, v_prediction_base: Path, latents: Latents
) -> None:
    chosen = base if prediction_type == "epsilon" else v_prediction_base
    result, _ = run_distillation(chosen, latents, steps=40, validate_every=40)
    assert result.val_loss < 0.9 * result.base_val_loss
    assert result.val_loss_by_band.keys() == {"999", "699"}


def test_distilling_twice_gives_the_same_bytes(
    plain: tuple[TrainingResult, list[torch.Tensor]], base: Path, latents: Latents
) -> None:
    result, weights = run_distillation(base, latents)
    assert all_equal(weights, plain[1])
    assert result.results() == plain[0].results()


def test_stopped_and_resumed_distillation_equals_an_uninterrupted_one(
    plain: tuple[TrainingResult, list[torch.Tensor]], base: Path, latents: Latents, tmp_path: Path
) -> None:
    unet = load_unet(base)

    def stop(step: int, _row: Mapping[str, float]) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(BestiaryError, match=r"stopped on SIGTERM after step 4 of 8. Run the same command again"):
        distill(
            unet, load_scheduler(base), latents, distill_settings(), seed=0, on_log=stop, checkpoints=tmp_path / "run"
        )
    result, weights = run_distillation(base, latents, tmp_path / "run")
    assert all_equal(weights, plain[1])
    assert result.results() == plain[0].results()


@pytest.mark.usefixtures("bfloat16")
def test_in_bfloat16_as_on_a_gpu_the_student_learns_in_float32(base: Path, latents: Latents) -> None:
    unet = load_pipeline(base, device="cpu", dtype=torch.bfloat16).unet.requires_grad_(False)
    result = distill(unet, load_scheduler(base), latents, distill_settings(), seed=0)
    assert result.val_loss < result.base_val_loss
    assert {weight.dtype for weight in adapter_weights(unet)} == {torch.float32}


class Gaussian(torch.nn.Module):
    """The exact denoiser of latents with the standard deviation 0.5, moved by what the prompt says."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.passes = 0

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor) -> SimpleNamespace:
        alpha, sigma = (values[timesteps][:, None, None, None] for values in (self.schedule.alpha, self.schedule.sigma))
        mean = features.mean(dim=(1, 2))[:, None, None, None]
        clean = mean + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (noisy - alpha * mean)
        self.passes += len(noisy)
        return SimpleNamespace(sample=(alpha * noisy - clean) / sigma)  # the velocity


def test_the_teachers_path_ends_where_the_guided_probability_flow_does(v_prediction_base: Path) -> None:
    scheduler = load_scheduler(v_prediction_base)
    schedule = NoiseSchedule.of(scheduler, torch.device("cpu"))
    unet = Gaussian(schedule)
    settings = distill_settings(timesteps=[999], path_end=4, teacher_steps=25, guidance_interval=None)
    path = TeacherPath(cast("UNet2DConditionModel", unet), scheduler, settings, torch.zeros(4))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompted, empty = torch.full((2, 6, 32), 0.2), torch.full((1, 6, 32), -0.1)
    found = path.end(noise, 999, prompted, empty)
    assert unet.passes == 2 * (25 * 2 + 1) * 2  # pictures, halves of the steps and the last guess, guidance
    # Guidance of 3 moves the mean to -0.1 + 3 * 0.3, and the flow of a Gaussian only scales.
    deviation = (0.25 * schedule.alpha[999] ** 2 + schedule.sigma[999] ** 2).sqrt()
    exact = 0.8 + 0.5 * (noise - schedule.alpha[999] * 0.8) / deviation
    assert (found - exact).abs().max() < 0.03 * exact.abs().max()


def test_the_path_starts_with_the_mean_image_and_is_followed_to_the_next_pass(v_prediction_base: Path) -> None:
    scheduler = load_scheduler(v_prediction_base)
    schedule = NoiseSchedule.of(scheduler, torch.device("cpu"))
    settings = distill_settings(timesteps=[999, 699], path_end=399, teacher_steps=5, guidance_interval=None)
    means = torch.tensor([0.5, -0.5, 0.25, 0.0])
    unet = cast("UNet2DConditionModel", Gaussian(schedule))
    path = TeacherPath(unet, scheduler, settings, means)
    noise, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([999, 699])
    trace = path.start(noise, timesteps[:1].repeat(2)) - schedule.sigma[999] * noise
    torch.testing.assert_close(trace.mean(dim=(0, 2, 3)), schedule.alpha[999] * means)
    assert trace.std(dim=(0, 2, 3)).max() < 1e-6
    prompted, empty = torch.full((2, 6, 32), 0.2), torch.full((1, 6, 32), -0.1)
    moved, reached = path.follow(noise, timesteps, prompted, empty)
    assert reached.tolist() == [699, 399]
    one_by_one, at = noise[:1], timesteps[:1]
    while at[0] > 699:
        one_by_one, at = path.move(one_by_one, at, prompted[:1], empty)
    torch.testing.assert_close(moved[:1], one_by_one)


@pytest.mark.slow
def test_a_unet_of_stable_diffusions_blocks_is_distilled_with_its_guidance_everywhere() -> None:
    """The layout of Stable Diffusion 1.5, with narrow layers."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=768,
    )
    cache = stable_diffusion_cache()
    small = {name: values[..., :8, :8].contiguous() for name, values in cache.shards[0].items()}
    cache = replace(cache, shards=[small])
    settings = distill_settings(
        steps=2,
        batch_size=1,
        validate_every=2,
        guidance_interval=None,
        gradient_checkpointing=True,
        targets=[*yaml.safe_load((ROOT / "params.yaml").read_text())["distill"]["targets"]],
    )
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    result = distill(unet.requires_grad_(False), scheduler, Latents(cache, cache), settings, seed=0)
    assert np.isfinite(result.val_loss)
    assert all(weight.isfinite().all() for weight in adapter_weights(unet))


# ---- the adapter ----


def test_the_few_step_adapter_is_exactly_the_style_and_the_difference(base: Path, style: Path, few_step: Path) -> None:
    assert verify_adapter(few_step, base).base_is_the_trained_one
    both = load_pipeline(base, device="cpu")
    apply_adapters(both, [style, few_step / "difference"], [1.0, 1.0])
    alone = load_pipeline(base, device="cpu")
    apply_adapter(alone, few_step)
    noise, features = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 32)
    with torch.no_grad():
        expected, found = (each.unet(noise, torch.tensor([500]), features).sample for each in (both, alone))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_few_step_adapter_sets_how_to_draw_with_a_style_adapter_too(style: Path, few_step: Path) -> None:
    adapter = resolve(str(few_step))
    assert adapter.few_step
    assert adapter.notes == (
        f"{few_step} is a few-step adapter according to its file. Default: 2 steps of the sampler lcm, no guidance.",
    )
    assert (found := defaults_of([adapter])) is not None
    assert found.sampling == TWO_STEPS
    assert (beside := defaults_of([resolve(str(style)), adapter])) is not None
    assert beside.sampling == TWO_STEPS


def test_each_pass_predicts_the_clean_picture_at_its_timestep_with_fresh_noise_between(
    v_prediction_base: Path, style: Path
) -> None:
    pipeline = load_pipeline(v_prediction_base, device="cpu")
    apply_adapter(pipeline, style)
    seen: list[tuple[torch.Tensor, int]] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].clone(), int(inputs[1]))))
    generate(pipeline, ["a zebra"], [7], TWO_STEPS, batch_size=1)
    hook.remove()
    assert [timestep for _, timestep in seen] == [999, 699]
    generator = seeded(7)
    noise, fresh = torch.randn(4, 8, 8, generator=generator)[None], torch.randn(1, 4, 8, 8, generator=generator)
    torch.testing.assert_close(seen[0][0], noise)
    schedule = NoiseSchedule.of(load_scheduler(v_prediction_base), torch.device("cpu"))
    features = pipeline.encode_prompt("a zebra", "cpu", 1, False)[0]
    with torch.no_grad():
        prediction = pipeline.unet(noise, torch.tensor([999]), features).sample
    clean = schedule.split(noise, prediction, torch.tensor([999]))[0]
    torch.testing.assert_close(seen[1][0], schedule.noised(clean, fresh, torch.tensor([699])), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (replace(TWO_STEPS, steps=20), "was distilled for 2 steps, not for 20. Draw with 2 steps."),
        (
            replace(TWO_STEPS, guidance_scale=7.0),
            "distilled for 2 steps without guidance, not for guidance scale 7.",
        ),
        (replace(TWO_STEPS, sampler="ddim"), "The sampler DDIM cannot draw at the timesteps"),
    ],
)
def test_a_few_step_adapter_rejects_other_steps_guidance_and_samplers(
    sampling: Sampling, message: str, base: Path, few_step: Path
) -> None:
    pipeline = load_pipeline(base, device="cpu")
    apply_adapter(pipeline, few_step)
    with pytest.raises(BestiaryError, match=message):
        generate(pipeline, ["a zebra"], [0], sampling, batch_size=1)


# ---- one that others distilled ----


def test_a_downloaded_few_step_adapter_is_combined_with_the_trained_one_at_its_weight(
    base: Path, style: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lcm-lora-sdv1-5"
    file = make_adapter(load_unet(base), folder, seed=1, targets=["to_q", "conv1"])
    file.write_bytes(replace(read_adapter(file), provenance=Provenance()).to_bytes())
    chosen = FewStepModel(model=str(folder), revision=None, file=None, weight=0.5)
    assert find_few_step(chosen) == file
    assert sampling_of(chosen, file) == Sampling("lcm", steps=4, guidance_scale=1.0)
    content = combine(style, file, 0.5, sampling_of(chosen, file), Provenance())
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / FILE_NAME).write_bytes(content.to_bytes())
    both, alone = load_pipeline(base, device="cpu"), load_pipeline(base, device="cpu")
    apply_adapters(both, [style, file], [1.0, 0.5])
    apply_adapter(alone, tmp_path / "few")
    noise, features = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 32)
    with torch.no_grad():
        expected, found = (each.unet(noise, torch.tensor([500]), features).sample for each in (both, alone))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert resolve(str(tmp_path / "few")).few_step
    assert len(generate(alone, ["a zebra"], [0], sampling_of(chosen, file), batch_size=1)) == 1


def test_a_few_step_adapter_that_is_missing_or_does_not_say_how_to_draw_is_refused(
    base: Path, style: Path, tmp_path: Path
) -> None:
    chosen = FewStepModel(model=str(style), revision=None, file=None, weight=1.0)
    with pytest.raises(BestiaryError, match=r"distill.from: .* does not say how to draw with it. Choose a few-step"):
        sampling_of(chosen, find_few_step(chosen))

    def offline(*_: object) -> Path:
        raise OSError("no network")

    with pytest.raises(BestiaryError, match=r"The few-step adapter somebody/lcm-lora is not complete on this machine"):
        find_few_step(chosen.model_copy(update={"model": "somebody/lcm-lora"}), offline)


# ---- bad input ----


def test_adapters_and_bases_that_cannot_be_distilled_are_refused_in_one_sentence(
    base: Path, style: Path, few_step: Path, tmp_path: Path
) -> None:
    pipeline, model = load_pipeline(base, device="cpu"), Model(model=str(base), revision=None)
    with pytest.raises(BestiaryError, match="There is no adapter at"):
        make_teacher(pipeline, tmp_path, model)
    with pytest.raises(BestiaryError, match="is already a few-step adapter"):
        make_teacher(pipeline, few_step, model)
    foreign = save_adapter(foreign_unet(base), tmp_path / "foreign", Provenance(base_sha256="0" * 64))
    with pytest.raises(BestiaryError, match="was trained on another base than"):
        make_teacher(pipeline, foreign.parent, model)
    make_adapter(load_unet(base), tmp_path / "dora", use_dora=True)
    dora = replace(read_adapter(tmp_path / "dora" / FILE_NAME), provenance=Provenance())
    (tmp_path / "dora" / FILE_NAME).write_bytes(dora.to_bytes())
    with pytest.raises(BestiaryError, match="holds DoRA, but only a plain LoRA"):
        make_teacher(pipeline, tmp_path / "dora", model)
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, time_cond_proj_dim=16)
    with pytest.raises(BestiaryError, match="is a latent consistency model, which already draws in a few steps"):
        make_teacher(pipeline, style, model)


def foreign_unet(base: Path) -> UNet2DConditionModel:
    unet = load_unet(base)
    make_adapter(unet, base.parent / "unused")
    return unet


# ---- the stage ----


@pytest.mark.slow
@pytest.mark.parametrize("source", ["distilled", "of others"])
def test_the_stage_writes_an_adapter_that_draws_in_its_few_steps(
    source: str, base: Path, style: Path, latents_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stages", "src", "models/judge", "fast"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    for name, folder in (("models/adapter", style), ("models/base", base), ("build/latents", latents_folder)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder)
    make_adapter(load_unet(base), tmp_path / "lcm-lora", seed=1)
    lcm = replace(read_adapter(tmp_path / "lcm-lora" / FILE_NAME), provenance=Provenance())
    (tmp_path / "lcm-lora" / FILE_NAME).write_bytes(lcm.to_bytes())
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["profiles"]["sample"]["encode"]["resolution"] = 32
    changes: dict[str, object] = {
        "steps": 2,
        "batch_size": 2,
        "validate_every": 2,
        "sheet_animals": 1,
        "teacher_steps": 2,
    }
    if source == "of others":
        changes |= {"from": {"model": "lcm-lora", "revision": None, "file": None, "weight": 0.7}}
    params["profiles"]["sample"]["distill"] |= changes
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    monkeypatch.setenv("BESTIARY_TRACKING", "off")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    weight = 1.0 if source == "distilled" else 0.5  # that a sweep chose
    point = write_operating_point(Path("reports/operating_point"), Path("models/adapter"), weight, guidance_scale=3.0)
    runpy.run_path("stages/distill.py", run_name="__main__")
    report = json.loads((tmp_path / "reports" / "results" / "distill.json").read_text())
    content = read_adapter(tmp_path / "models" / "few_step" / FILE_NAME)
    of_profile = replace(TWO_STEPS, timesteps=(999, 799))
    assert content.few_step == (of_profile if source == "distilled" else Sampling("lcm", 4, 1.0))
    assert (tmp_path / "reports" / "distill" / "sheet.png").is_file()
    assert len(report["adapter_sha256"]) == 64
    taught_from = (content.provenance.model_extra or {})["distilled_from"]
    assert taught_from["adapter_sha256"] == point.adapter_sha256  # as accept and register require
    if source == "of others":
        lcm_file = tmp_path / "lcm-lora" / FILE_NAME
        assert taught_from["few_step_sha256"] == adapter_sha256(lcm_file)
        parents = [Parent("style", adapter_file("models/adapter"), 0.5), Parent("lcm", lcm_file, 0.7)]
        expected = merge(parents).content.weights
        assert content.weights.keys() == expected.keys()
        assert all_equal([content.weights[key] for key in expected], list(expected.values()))
    pipeline: StableDiffusionPipeline = load_pipeline(base, device="cpu")
    apply_adapter(pipeline, tmp_path / "models" / "few_step")
    assert len(generate(pipeline, ["a zebra"], [0], content.few_step, batch_size=1)) == 1
    assert not list((tmp_path / ".cache" / "distill").glob("*"))
