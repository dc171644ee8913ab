from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from bestiary.diffusion.adapter import inject
from bestiary.diffusion.base import load_pipeline, load_scheduler
from bestiary.diffusion.sampling import Start, generate, make_scheduler, seeded
from bestiary.errors import BestiaryError
from bestiary.samplers import SAMPLERS, Sampling

SAMPLING = Sampling("dpmsolver++", steps=4, guidance_scale=3.0)


@pytest.fixture(scope="module")
def pipeline(base: Path) -> StableDiffusionPipeline:
    return load_pipeline(base, device="cpu")


@pytest.fixture(scope="module")
def lcm(base: Path) -> StableDiffusionPipeline:
    """A base that takes its guidance as an input, like a latent consistency model."""
    pipeline = load_pipeline(base, device="cpu")
    torch.manual_seed(0)
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, time_cond_proj_dim=16).eval()
    return pipeline


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_a_picture_depends_on_its_prompt_and_seed_alone(request: pytest.FixtureRequest, scheduler: str) -> None:
    pipeline = request.getfixturevalue("lcm" if scheduler == "lcm" else "pipeline")
    prompts, seeds = ["a zebra", "a cat", "a zebra"], [3, 4, 5]
    sampling = replace(SAMPLING, sampler=scheduler)
    together = generate(pipeline, prompts, seeds, sampling, batch_size=2)
    for prompt, seed, image in zip(prompts, seeds, together, strict=True):
        alone = generate(pipeline, [prompt], [seed], sampling, batch_size=2)[0]
        # Another batch size may round differently, by one level of 255.
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1
    again = generate(pipeline, prompts, seeds, sampling, batch_size=2)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in together]


@pytest.mark.parametrize("name", SAMPLERS)
def test_stochastic_samplers_are_marked_as_such(pipeline: StableDiffusionPipeline, name: str) -> None:
    """The benchmark reports no distance to a converged picture for them."""
    steps = []
    for seed in (0, 1):
        pipeline.scheduler = make_scheduler(name, pipeline.scheduler.config)
        pipeline.scheduler.set_timesteps(4)
        generator = torch.Generator("cpu").manual_seed(seed)
        extra = pipeline.prepare_extra_step_kwargs(generator, SAMPLERS[name].eta)
        latents = torch.ones(1, 8, 8, 8)
        steps.append(pipeline.scheduler.step(0.5 * latents, pipeline.scheduler.timesteps[0], latents, **extra)[0])
    assert torch.equal(*steps) != SAMPLERS[name].stochastic


def test_a_pipeline_in_half_precision_draws_with_an_adapter(base: Path) -> None:
    pipeline = load_pipeline(base, device="cpu", dtype=torch.bfloat16)
    plain = generate(pipeline, ["a zebra"], [0], SAMPLING, batch_size=2)[0].tobytes()
    parameters = inject(pipeline.unet, rank=2, alpha=2, dropout=0.0, targets=["to_q", "to_v"], seed=0)
    for parameter in parameters:
        parameter.data.fill_(0.3)
    assert generate(pipeline, ["a zebra"], [0], SAMPLING, batch_size=2)[0].tobytes() != plain


def test_an_interval_of_all_noise_levels_guides_every_step(
    pipeline: StableDiffusionPipeline,
) -> None:
    prompts, seeds = ["a zebra", "a cat"], [3, 4]

    def draw(sampling: Sampling) -> list[bytes]:
        return [image.tobytes() for image in generate(pipeline, prompts, seeds, sampling, batch_size=2)]

    always, never = draw(SAMPLING), draw(replace(SAMPLING, guidance_scale=1.0))
    assert draw(replace(SAMPLING, guidance_interval=(0.0, 1000.0))) == always
    assert draw(replace(SAMPLING, guidance_interval=(999.0, 1000.0))) == never
    assert draw(replace(SAMPLING, guidance_interval=(0.5, 5.0))) not in (always, never)


@pytest.mark.parametrize("scheduler", ["ddpm", "dpmsolver++karras", "dpmsolver++sde", "euler"])
def test_steps_outside_the_guidance_interval_cost_half(pipeline: StableDiffusionPipeline, scheduler: str) -> None:
    seen: list[tuple[float, int]] = []

    def note(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        alpha = pipeline.scheduler.alphas_cumprod[round(float(inputs[1]))]
        seen.append((float(((1 - alpha) / alpha) ** 0.5), len(inputs[0])))

    hook = pipeline.unet.register_forward_pre_hook(note)
    done: list[int] = []
    sampling = replace(SAMPLING, steps=8, sampler=scheduler, guidance_interval=(0.5, 5.0))
    generate(pipeline, ["a zebra"], [0], sampling, batch_size=2, progress=lambda now, _: done.append(now))
    hook.remove()
    assert [size for _, size in seen] == [2 if 0.5 < sigma <= 5.0 else 1 for sigma, _ in seen]
    assert {size for _, size in seen} == {1, 2}
    assert done == list(range(1, 9))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("lcm", "tcd")])
@pytest.mark.parametrize("steps", [10, 100, 400])
def test_every_sampler_starts_at_pure_noise(base: Path, name: str, steps: int) -> None:
    config = load_scheduler(base).config
    assert config.timestep_spacing == "leading"  # with which diffusers' DPM++ would start 400 steps at 800
    scheduler = make_scheduler(name, config)
    scheduler.set_timesteps(steps)
    assert float(scheduler.timesteps[0]) >= 998


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_step_starts_at_pure_noise(request: pytest.FixtureRequest, name: str) -> None:
    pipeline = request.getfixturevalue("lcm" if name == "lcm" else "pipeline")
    seen: list[float] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1])))
    generate(pipeline, ["a zebra"], [0], replace(SAMPLING, sampler=name, steps=1), batch_size=2)
    hook.remove()
    assert len(seen) == 1
    assert seen[0] >= 980  # LCM uses one of its 50 steps


@pytest.mark.parametrize("steps", [7, 20, 400])
def test_ddim_follows_its_paper(base: Path, steps: int) -> None:
    scheduler = make_scheduler("ddim", load_scheduler(base).config)
    scheduler.set_timesteps(steps)
    alphas = [*scheduler.alphas_cumprod[scheduler.timesteps].double(), torch.tensor(1.0).double()]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = latents
    for timestep, alpha, following in zip(scheduler.timesteps, alphas, alphas[1:], strict=False):
        noise = latents.roll(int(timestep), -1)  # stands in for a UNet's answer
        latents = scheduler.step(noise, timestep, latents)[0]
        clean = (expected - (1 - alpha).sqrt() * noise) / alpha.sqrt()  # arXiv:2010.02502, eq. 12 with sigma = 0
        expected = following.sqrt() * clean + (1 - following).sqrt() * noise
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_euler_a_takes_the_steps_of_k_diffusion(base: Path) -> None:
    scheduler = make_scheduler("euler-ancestral", load_scheduler(base).config)
    scheduler.set_timesteps(7)
    sigmas = scheduler.sigmas.double()
    drawn = expected = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double() * sigmas[0]
    theirs, ours = (torch.Generator().manual_seed(1) for _ in range(2))
    for timestep, sigma, following in zip(scheduler.timesteps, sigmas, sigmas[1:], strict=False):
        noise = drawn.roll(int(timestep), -1) / sigma  # stands in for a UNet's answer
        drawn = scheduler.step(noise, timestep, drawn, generator=ours)[0]
        up = (following**2 * (sigma**2 - following**2) / sigma**2).sqrt()  # sample_euler_ancestral with eta 1
        fresh = torch.randn(1, 4, 8, 8, generator=theirs, dtype=torch.float64)
        expected = expected + noise * ((following**2 - up**2).sqrt() - sigma) + fresh * up
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_does_not_depend_on_the_one_used_before_it(base: Path, name: str) -> None:
    config = load_scheduler(base).config
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for before in SAMPLERS:
        scheduler = make_scheduler(name, make_scheduler(before, config).config)
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        drawn = latents
        for timestep in scheduler.timesteps:
            extra = {} if name == "unipc" else {"generator": generator}
            drawn = scheduler.step(0.5 * drawn, timestep, drawn, **extra)[0]
        found.append(drawn)
    assert all(torch.equal(found[0], other) for other in found)


def test_karras_noise_levels_are_denser_at_the_end() -> None:
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    plain, karras = (make_scheduler(name, config) for name in ("dpmsolver++", "dpmsolver++karras"))
    for scheduler in (plain, karras):
        scheduler.set_timesteps(10)
    assert float(karras.sigmas[8]) < float(plain.sigmas[8])
    # A sampler built from its config does not inherit them.
    assert make_scheduler("euler", karras.config).config.use_karras_sigmas is False


def test_lcm_settings_need_an_lcm_base_and_an_lcm_base_needs_them(
    pipeline: StableDiffusionPipeline, lcm: StableDiffusionPipeline
) -> None:
    with pytest.raises(BestiaryError, match="'lcm'"):
        generate(pipeline, ["a cat"], [0], replace(SAMPLING, sampler="lcm"), batch_size=2)
    with pytest.raises(BestiaryError, match="guidance interval 0 to 1000"):
        generate(lcm, ["a cat"], [0], replace(SAMPLING, guidance_interval=(0.5, 5.0)), batch_size=2)
    with pytest.raises(BestiaryError, match="at most 50 steps, not 51"):
        generate(lcm, ["a cat"], [0], replace(SAMPLING, sampler="lcm", steps=51), batch_size=2)
    (everywhere,) = generate(lcm, ["a cat"], [0], replace(SAMPLING, guidance_interval=(0.0, 1000.0)), batch_size=2)
    assert everywhere.tobytes() == generate(lcm, ["a cat"], [0], SAMPLING, batch_size=2)[0].tobytes()


def test_another_seed_or_prompt_gives_another_picture(pipeline: StableDiffusionPipeline) -> None:
    images = generate(pipeline, ["a zebra", "a zebra", "a cat"], [0, 1, 0], SAMPLING, batch_size=2)
    assert len({image.tobytes() for image in images}) == 3


def test_pictures_have_the_size_of_the_base_unless_another_is_given(pipeline: StableDiffusionPipeline) -> None:
    assert generate(pipeline, ["a cat"], [0], SAMPLING, batch_size=2)[0].size == (32, 32)
    for size in ((48, 48), (48, 32)):
        sampling = replace(SAMPLING, width=size[0], height=size[1])
        assert generate(pipeline, ["a cat"], [0], sampling, batch_size=2)[0].size == size
    with pytest.raises(BestiaryError, match="33 is not a multiple of 8"):
        generate(pipeline, ["a cat"], [0], replace(SAMPLING, width=33, height=33), batch_size=2)


def test_guidance_leads_away_from_the_negative_prompt_as_in_diffusers(pipeline: StableDiffusionPipeline) -> None:
    sampling = replace(SAMPLING, sampler="ddim", width=48, height=32)
    without, away = (
        generate(pipeline, ["a cat"], [0], replace(sampling, negative_prompt=words), batch_size=1)[0]
        for words in ("", "a zebra")
    )
    assert without.tobytes() != away.tobytes()
    factor = pipeline.vae_scale_factor
    noise = torch.randn((1, pipeline.unet.config.in_channels, 32 // factor, 48 // factor), generator=seeded(0))
    pipeline.scheduler = make_scheduler("ddim", pipeline.scheduler.config, 4)
    theirs = pipeline("a cat", negative_prompt="a zebra", latents=noise, num_inference_steps=4, guidance_scale=3.0)
    assert np.abs(np.asarray(theirs.images[0], int) - np.asarray(away, int)).max() <= 1


def test_a_negative_prompt_that_would_have_no_effect_or_is_too_long_is_refused(
    pipeline: StableDiffusionPipeline, lcm: StableDiffusionPipeline
) -> None:
    negative = replace(SAMPLING, negative_prompt="blurry")
    for base, sampling in (
        (pipeline, replace(negative, guidance_scale=1.0)),
        (lcm, replace(negative, sampler="lcm")),
    ):
        with pytest.raises(BestiaryError, match="A negative prompt has no effect without guidance"):
            generate(base, ["a cat"], [0], sampling, batch_size=1)
    with pytest.raises(BestiaryError, match="tokens and the base reads 77: 'blur"):
        generate(pipeline, ["a cat"], [0], replace(SAMPLING, negative_prompt="blur " * 80), batch_size=1)


def test_progress_counts_to_the_total_and_can_stop_the_drawing(pipeline: StableDiffusionPipeline) -> None:
    seen: list[tuple[int, int]] = []
    generate(pipeline, ["a cat"] * 3, [0, 1, 2], SAMPLING, batch_size=2, progress=lambda *now: seen.append(now))
    assert seen == [(2, 12), (4, 12), (6, 12), (8, 12), (9, 12), (10, 12), (11, 12), (12, 12)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, ["a cat"], [0], SAMPLING, batch_size=2, progress=stop)


def test_an_unknown_sampler_and_too_long_a_prompt_are_named(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(BestiaryError, match=r"'magic'.* ddpm, ddim"):
        generate(pipeline, ["a cat"], [0], replace(SAMPLING, sampler="magic"), batch_size=2)
    with pytest.raises(BestiaryError, match="tokens and the base reads 77"):
        generate(pipeline, ["cat " * 40], [0], SAMPLING, batch_size=2)


def test_all_64_bits_of_a_seed_count() -> None:
    numbers = {
        seed: seeded(seed).get_state().numpy().tobytes()
        for seed in (7, *(7 + 2**bit for bit in range(3, 64)), 2**64 - 1, 2**32 - 1)
    }
    assert len(set(numbers.values())) == len(numbers)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_seeds_of_32_bits_are_torchs_own(seed: int) -> None:
    theirs = torch.randn(8, generator=torch.Generator("cpu").manual_seed(seed))
    assert torch.equal(torch.randn(8, generator=seeded(seed)), theirs)


def test_a_seed_above_32_bits_draws_another_picture(pipeline: StableDiffusionPipeline) -> None:
    first, second = generate(pipeline, ["a cat"] * 2, [7, 7 + 2**32], SAMPLING, batch_size=2)
    assert first.tobytes() != second.tobytes()


def test_an_lcm_lora_draws_with_its_sampler_on_any_base(base: Path) -> None:
    pipeline = load_pipeline(base, device="cpu")
    inject(pipeline.unet, rank=2, alpha=2, dropout=0.0, targets=["to_q"], seed=0)
    few_steps = Sampling("lcm", steps=4, guidance_scale=1.0)
    assert len(generate(pipeline, ["a cat"], [0], few_steps, batch_size=1)) == 1
    with pytest.raises(BestiaryError, match="at most 50 steps"):
        generate(pipeline, ["a cat"], [0], replace(few_steps, steps=51), batch_size=1)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    colours = np.random.default_rng(0).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((80, 48), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_an_image_is_drawn_anew_as_diffusers_does_it(
    request: pytest.FixtureRequest, photo: Image.Image, scheduler: str
) -> None:
    pipeline = request.getfixturevalue("lcm" if scheduler == "lcm" else "pipeline")
    sampling = replace(SAMPLING, sampler=scheduler)
    start = Start(photo, 0.5)
    calls: list[tuple[int, int]] = []
    drawn = generate(
        pipeline,
        ["a zebra"] * 2,
        [3, 4],
        sampling,
        batch_size=1,
        start=start,
        progress=lambda *done: calls.append(done),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]  # two of the four steps for each of two pictures
    again = generate(pipeline, ["a zebra"], [4], sampling, batch_size=1, start=start)
    assert again[0].tobytes() == drawn[1].tobytes()
    theirs = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    middle = photo.crop((16, 0, 64, 48)).resize((32, 32), Image.Resampling.LANCZOS)
    expected = theirs(
        "a zebra",
        image=middle,
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=3.0,
        eta=SAMPLERS[scheduler].eta,
        generator=seeded(3),
    ).images[0]
    assert np.abs(np.asarray(expected, int) - np.asarray(drawn[0], int)).max() <= 1


def test_a_guidance_interval_holds_for_the_steps_that_are_drawn(
    pipeline: StableDiffusionPipeline, photo: Image.Image
) -> None:
    def draw(sampling: Sampling) -> bytes:
        (image,) = generate(pipeline, ["a zebra"], [0], sampling, batch_size=1, start=Start(photo, 0.5))
        return image.tobytes()

    guided = draw(SAMPLING)
    assert draw(replace(SAMPLING, guidance_interval=(0.0, 1000.0))) == guided
    # The first two of the four steps, whose noise levels are above 2, are not drawn.
    assert draw(replace(SAMPLING, guidance_interval=(0.0, 2.0))) == guided
    assert draw(replace(SAMPLING, guidance_interval=(900.0, 901.0))) == draw(replace(SAMPLING, guidance_scale=1.0))

    with pytest.raises(BestiaryError, match="The sampler tcd draws in at most 50 steps"):
        generate(pipeline, ["a cat"], [0], Sampling("tcd", steps=51), batch_size=1)


def test_ddim_trailing_denoises_at_the_ends_of_equal_parts_as_hyper_sd_was_distilled(base: Path) -> None:
    scheduler = make_scheduler("ddim-trailing", load_scheduler(base).config)
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]


def test_tcd_adds_the_noise_that_its_authors_advise(pipeline: StableDiffusionPipeline) -> None:
    seen: list[float] = []
    sampling = Sampling("tcd", steps=4, guidance_scale=1.0)
    make = type(make_scheduler("tcd", pipeline.scheduler.config)).step

    def step(self: object, *arguments: object, eta: float = 0.0, **options: object) -> object:
        seen.append(eta)
        return make(self, *arguments, eta=eta, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.TCDScheduler.step", step)
        generate(pipeline, ["a cat"], [0], sampling, batch_size=1)
    assert seen == [0.3] * 4
