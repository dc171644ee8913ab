"""Generate pictures from prompts and seeds.

A picture depends on its own prompt and seed only, except that another batch size may round its last bits differently.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from PIL import ImageOps
from PIL.Image import Image, Resampling

from bestiary.diffusion.base import encode_text, quiet_loading
from bestiary.diffusion.decoders import decoder_of
from bestiary.diffusion.few_step import check_few_step
from bestiary.diffusion.prompts import encode_prompts
from bestiary.diffusion.weight_changes import has_changes
from bestiary.errors import BestiaryError
from bestiary.samplers import SAMPLERS, Sampling, denoising_steps

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionPipeline


@dataclass(frozen=True)
class Start:
    """An RGB image to start from instead of noise, and the denoising strength, above 0 and up to 1."""

    image: Image
    denoise: float


Progress = Callable[[int, int], None]  # steps x pictures: done, total
Tensors: TypeAlias = dict[str, Any]  # what diffusers hands to a callback, by its own names
StepEnd = Callable[[Any, int, Any, Tensors], Tensors]  # diffusers' callback: pipeline, step, timestep, tensors


def make_scheduler(name: str, config: Mapping[str, Any], steps: int | None = None) -> SchedulerMixin:
    """Build diffusers' scheduler for the sampler `name` on the noise schedule of a base's scheduler `config`.

    Give the number of `steps` when it is known: a single step needs another spacing.
    """
    import diffusers

    sampler = SAMPLERS[name]
    options = dict(sampler.options)
    # A linspace of one point is timestep 0, at which there is no noise to remove.
    if steps == 1 and options["timestep_spacing"] == "linspace":
        options["timestep_spacing"] = "trailing"
    return getattr(diffusers, sampler.scheduler).from_config(config, **options)


def is_lcm(pipeline: StableDiffusionPipeline) -> bool:
    """Whether the base is a latent consistency model, which takes its guidance as an input (arXiv:2310.04378)."""
    return pipeline.unet.config.time_cond_proj_dim is not None


def max_lcm_steps(pipeline: StableDiffusionPipeline) -> int:
    """The number of steps that consistency models were distilled on, which is the most they can draw with."""
    steps: int = make_scheduler("lcm", pipeline.scheduler.config).config.original_inference_steps
    return steps


def base_side(pipeline: StableDiffusionPipeline) -> int:
    """Pixels a side of the pictures that the base was trained on."""
    side: int = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return side


def check_sampling(pipeline: StableDiffusionPipeline, sampling: Sampling) -> None:
    """Raise BestiaryError when this base cannot draw so.

    The reasons: an unknown sampler, a wrong size, too many LCM steps, a negative prompt without guidance, or a few-step
    adapter that was distilled for other settings.
    """
    if sampling.sampler not in SAMPLERS:
        raise BestiaryError(f"There is no sampler {sampling.sampler!r}. Choose one of {', '.join(SAMPLERS)}.")
    # diffusers itself demands multiples of 8; an export may demand more.
    multiple = math.lcm(8, pipeline.vae_scale_factor, getattr(pipeline.unet, "side_step", 1))
    for side in (sampling.width, sampling.height):
        if side is not None and side % multiple:
            raise BestiaryError(f"The resolution {side} is not a multiple of {multiple}.")
    if sampling.negative_prompt and (sampling.guidance_scale <= 1 or is_lcm(pipeline)):
        raise BestiaryError(
            "A negative prompt has no effect without guidance. Leave it out, or draw with a guidance scale above 1 and "
            "a base that is no latent consistency model."
        )
    check_few_step(sampling)
    # An LCM-LoRA (arXiv:2311.05556) cannot be told from another adapter by its weights. Timesteps come only with a
    # few-step adapter, which may be fused into the base.
    may_be_lcm = is_lcm(pipeline) or _has_adapter(pipeline) or sampling.timesteps is not None
    if sampling.sampler == "lcm" and not may_be_lcm:
        raise BestiaryError("The scheduler 'lcm' needs a latent consistency model, and this base is not one.")
    if sampling.sampler in ("lcm", "tcd") and sampling.steps > (most := max_lcm_steps(pipeline)):
        what = "A latent consistency model" if sampling.sampler == "lcm" else "The sampler tcd"
        raise BestiaryError(f"{what} draws in at most {most} steps, not {sampling.steps}. Choose fewer steps.")


def _has_adapter(pipeline: StableDiffusionPipeline) -> bool:
    fused = getattr(pipeline.unet, "fused_adapter", False)  # set for an export
    return fused or bool(getattr(pipeline.unet, "peft_config", None)) or has_changes(pipeline.unet)


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU, other for each seed below 2**64.

    torch's own uses only the low 32 bits of a seed; a larger seed is hashed to 32 bits first.
    """
    if seed >= 2**32:
        seed = int.from_bytes(hashlib.sha256(seed.to_bytes(8, "little")).digest()[:4], "little")
    return torch.Generator("cpu").manual_seed(seed)


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    batch_size: int,
    progress: Progress | None = None,
    start: Start | None = None,
    a1111_prompts: bool = False,
) -> list[Image]:
    """Draw one picture for each prompt with its seed, with the adapter that is applied to the pipeline.

    All randomness of picture i comes from `seeded(seeds[i])`. The prompts are encoded once. Brackets in them, and in
    the negative prompt, are emphasis only with `a1111_prompts`.
    With a guidance interval only the steps whose noise level is inside it are guided (arXiv:2404.07724); the others
    cost half. With a `start`, the image is noised as far as the denoising strength says, and only the remaining steps
    are drawn (SDEdit, arXiv:2108.01073).
    `progress(done, total)` is called after each denoising step and counts steps x pictures; an exception that it raises
    stops the drawing.

    Raises BestiaryError when this base cannot draw with this sampling, when a prompt is too long, and when a picture
    contains values that are not finite.
    """
    check_sampling(pipeline, sampling)
    decoder_of(pipeline, sampling)  # reports a missing decoder before drawing
    if start and not hasattr(pipeline.vae, "encode"):
        raise BestiaryError("An export has no encoder, so it cannot start from an image. Use --engine torch.")
    width, height = (side or base_side(pipeline) for side in (sampling.width, sampling.height))
    pipeline.scheduler = make_scheduler(sampling.sampler, pipeline.scheduler.config, sampling.steps)
    steps = denoising_steps(sampling.steps, start.denoise) if start else sampling.steps
    scales = guidance_scales(pipeline, sampling)[-steps:]
    if len(set(scales)) > 1 and is_lcm(pipeline):
        raise BestiaryError(
            "This base is a latent consistency model, whose guidance cannot be turned off for some of the steps. "
            "Use the guidance interval 0 to 1000."
        )
    texts = [sampling.negative_prompt, *dict.fromkeys(prompts)]  # the first is what guidance leads away from
    encode = encode_prompts if a1111_prompts else encode_text
    features = encode(pipeline.tokenizer, pipeline.text_encoder, texts)  # (B, T, D)
    denoise = _from_noise if start is None else partial(_from_image, start, steps)
    images: list[Image] = []
    jobs = list(zip(prompts, seeds, strict=True))
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        guided = Guided(
            prompted=features[[texts.index(prompt) for prompt, _ in batch]],
            unprompted=features[[0] * len(batch)],
            scales=scales,
            report=_step_reporter(progress, first * steps, len(batch), len(jobs) * steps),
        )
        # Stochastic samplers draw more noise from the generators.
        latents = denoise(pipeline, sampling, (width, height), [seeded(seed) for _, seed in batch], guided)
        images.extend(_decode(pipeline, latents, sampling))
    return images


@dataclass(frozen=True)
class Guided:
    """What leads a batch: the features (B, T, D) of prompts and of the negative prompt, and each step's guidance."""

    prompted: torch.Tensor
    unprompted: torch.Tensor
    scales: Sequence[float]
    report: StepEnd | None


def _from_noise(
    pipeline: StableDiffusionPipeline,
    sampling: Sampling,
    size: tuple[int, int],
    generators: list[torch.Generator],
    guided: Guided,
) -> torch.Tensor:
    """The latents that the generators' noise is denoised to: (B, C, h, w)."""
    width, height = size
    factor = pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, height // factor, width // factor)  # (C, h, w)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])  # (B, C, h, w)
    latents: torch.Tensor = pipeline(
        prompt_embeds=guided.prompted,
        negative_prompt_embeds=guided.unprompted,
        latents=noise.to(pipeline.device, pipeline.unet.dtype),
        generator=generators,
        num_inference_steps=sampling.steps,
        timesteps=_timesteps(sampling),
        guidance_scale=guided.scales[0],
        height=height,
        width=width,
        eta=SAMPLERS[sampling.sampler].eta,
        callback_on_step_end=_switch_guidance(guided),
        output_type="latent",
    ).images
    return latents


def _timesteps(sampling: Sampling) -> list[int] | None:
    """The timesteps as diffusers expects them; None: as the scheduler spaces them."""
    return None if sampling.timesteps is None else list(sampling.timesteps)


def _from_image(
    start: Start,
    steps: int,
    pipeline: StableDiffusionPipeline,
    sampling: Sampling,
    size: tuple[int, int],
    generators: list[torch.Generator],
    guided: Guided,
) -> torch.Tensor:
    """The latents that the last `steps` make of the image with the generators' noise: (B, C, h, w)."""
    with quiet_loading():
        from diffusers import StableDiffusionImg2ImgPipeline

        from_image = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    from_image.set_progress_bar_config(disable=True)
    latents: torch.Tensor = from_image(
        prompt_embeds=guided.prompted,
        negative_prompt_embeds=guided.unprompted,
        image=ImageOps.fit(start.image, size, Resampling.LANCZOS),
        strength=min((steps + 0.5) / sampling.steps, 1.0),  # diffusers rounds steps * strength down
        generator=generators,  # for the posterior of the image's latents and for the noise
        num_inference_steps=sampling.steps,
        timesteps=_timesteps(sampling),
        guidance_scale=guided.scales[0],
        eta=SAMPLERS[sampling.sampler].eta,
        callback_on_step_end=_switch_guidance(guided),
        output_type="latent",
    ).images
    return latents


def _decode(pipeline: StableDiffusionPipeline, latents: torch.Tensor, sampling: Sampling) -> list[Image]:
    vae = decoder_of(pipeline, sampling)
    # A UNet in half precision with an adapter in training answers in float32.
    decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    if not torch.isfinite(decoded).all():  # as bytes these would silently become black
        source = "adapter" if _has_adapter(pipeline) else "base"
        raise BestiaryError(f"The {source} draws pictures that contain values that are not finite.")
    images: list[Image] = pipeline.image_processor.postprocess(decoded)
    return images


def guidance_scales(pipeline: StableDiffusionPipeline, sampling: Sampling) -> list[float]:
    """The guidance scale of each step; 1, which means no guidance, at noise levels outside the interval."""
    scale = sampling.guidance_scale
    if sampling.guidance_interval is None:
        return [scale] * sampling.steps
    pipeline.scheduler.set_timesteps(sampling.steps)
    low, high = sampling.guidance_interval
    alphas = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps.cpu().round().long()]
    sigmas = ((1 - alphas) / alphas).sqrt().tolist()  # of latents whose own scale is 1, as in the paper
    return [scale if low < sigma <= high else 1.0 for sigma in sigmas]


def _switch_guidance(guided: Guided) -> StepEnd | None:
    """A callback that switches the pipeline to the next step's guidance, as diffusers' guide to callbacks shows."""
    scales, report = guided.scales, guided.report
    if len(set(scales)) == 1:
        return report

    def switch(pipeline: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        if report is not None:
            report(pipeline, step, timestep, tensors)
        if step + 1 < len(scales) and scales[step + 1] != scales[step]:
            pipeline._guidance_scale = scales[step + 1]
            tensors["prompt_embeds"] = (
                torch.cat([guided.unprompted, guided.prompted]) if scales[step + 1] > 1 else guided.prompted
            )
        return tensors

    return switch


def _step_reporter(progress: Progress | None, done: int, pictures: int, total: int) -> StepEnd | None:
    if progress is None:
        return None

    def report(_pipeline: Any, step: int, _timestep: Any, tensors: Tensors) -> Tensors:
        progress(done + (step + 1) * pictures, total)
        return tensors

    return report
