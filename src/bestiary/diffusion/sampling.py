"""Pictures from prompts and seeds: the same prompt and seed give the same picture, whatever else is drawn beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bestiary.diffusion.base import encode_text
from bestiary.errors import BestiaryError
from bestiary.settings import SAMPLERS

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionPipeline
    from PIL.Image import Image


def make_scheduler(name: str, config: Mapping[str, Any], steps: int | None = None) -> SchedulerMixin:
    """The sampler `name` on the noise schedule of a base's scheduler `config`, for so many steps if they are known.

    Raises BestiaryError for an unknown name.
    """
    import diffusers

    if name not in SAMPLERS:
        raise BestiaryError(f"There is no scheduler {name!r}; choose one of {', '.join(SAMPLERS)}.")
    sampler = SAMPLERS[name]
    options = dict(sampler.options)
    if steps == 1 and options["timestep_spacing"] == "linspace":  # a line of one point, which should begin in the noise
        options["timestep_spacing"] = "trailing"
    return getattr(diffusers, sampler.scheduler).from_config(config, **options)


def is_lcm(pipeline: StableDiffusionPipeline) -> bool:
    """Whether the base is a latent consistency model, which takes its guidance as an input (arXiv:2310.04378)."""
    return pipeline.unet.config.time_cond_proj_dim is not None


def most_lcm_steps(pipeline: StableDiffusionPipeline) -> int:
    """The steps on which a latent consistency model was distilled: it takes no more."""
    most: int = make_scheduler("lcm", pipeline.scheduler.config).config.original_inference_steps
    return most


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    scheduler: str,
    batch_size: int,
    guidance_interval: Sequence[float] | None = None,
    resolution: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Image]:
    """One picture for each prompt with its seed, `resolution` pixels a side (None: the base's own).

    All randomness of picture i comes from torch.Generator("cpu").manual_seed(seeds[i]). The prompts' features are
    computed once. With a `guidance_interval` of noise levels (low, high] only the steps inside it are guided
    (arXiv:2404.07724); the others cost half. `progress(done, total)` is called after each denoising step, in steps
    times pictures; what it raises stops the work.

    Raises BestiaryError for a resolution, sampler or guidance that this base cannot have, for too long a prompt, and
    for pictures that are not finite numbers.
    """
    side = resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    multiple = math.lcm(8, pipeline.vae_scale_factor)  # 8 is diffusers' own demand
    if side % multiple:
        raise BestiaryError(f"The resolution {side} is not a multiple of {multiple}.")
    if scheduler == "lcm" and not is_lcm(pipeline):
        raise BestiaryError(
            "The scheduler 'lcm' is for bases that are latent consistency models, and this one is none."
        )
    if scheduler == "lcm" and steps > (most := most_lcm_steps(pipeline)):
        raise BestiaryError(f"A latent consistency model takes at most {most} steps.")
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config, steps)
    scales = _guidance_scales(pipeline, steps, guidance_scale, guidance_interval)
    if len(set(scales)) > 1 and is_lcm(pipeline):
        raise BestiaryError(
            "This base is a latent consistency model: its guidance cannot be turned off for some steps, so guide all "
            "noise levels, 0 to 1000."
        )
    texts = ["", *dict.fromkeys(prompts)]
    features = encode_text(pipeline.tokenizer, pipeline.text_encoder, texts)  # (B, T, D), the first is unconditional
    shape = (pipeline.unet.config.in_channels, side // pipeline.vae_scale_factor, side // pipeline.vae_scale_factor)
    images: list[Image] = []
    jobs = list(zip(prompts, seeds, strict=True))
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in batch]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])  # (B, C, h, w)
        prompted = features[[texts.index(prompt) for prompt, _ in batch]]
        unprompted = features[[0] * len(batch)]
        report = _step_reporter(progress, start * steps, len(batch), len(jobs) * steps)
        latents = pipeline(
            prompt_embeds=prompted,
            negative_prompt_embeds=unprompted,
            latents=noise.to(pipeline.device, pipeline.unet.dtype),
            generator=generators,  # for the schedulers that draw more noise on the way
            num_inference_steps=steps,
            guidance_scale=scales[0],
            height=side,
            width=side,
            callback_on_step_end=_switch_guidance(scales, prompted, unprompted, report),
            output_type="latent",
        ).images
        # While an adapter trains in half precision, its UNet answers in float32.
        latents = latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
        decoded = pipeline.vae.decode(latents).sample
        if not torch.isfinite(decoded).all():  # as bytes they would only be black
            who = "adapter" if getattr(pipeline.unet, "peft_config", None) else "base"
            raise BestiaryError(f"The {who} draws pictures that are not finite numbers.")
        images.extend(pipeline.image_processor.postprocess(decoded))
    return images


StepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def _guidance_scales(
    pipeline: StableDiffusionPipeline, steps: int, scale: float, interval: Sequence[float] | None
) -> list[float]:
    """The guidance scale of each step: `scale`, and 1, which is none, at noise levels outside the interval."""
    if interval is None:
        return [scale] * steps
    pipeline.scheduler.set_timesteps(steps)
    low, high = interval
    alphas = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps.cpu().round().long()]
    sigmas = ((1 - alphas) / alphas).sqrt().tolist()  # of latents whose own scale is 1, as in the paper
    return [scale if low < sigma <= high else 1.0 for sigma in sigmas]


def _switch_guidance(
    scales: Sequence[float], prompted: torch.Tensor, unprompted: torch.Tensor, report: StepEnd | None
) -> StepEnd | None:
    """After each step, set the pipeline to the next one's guidance, as diffusers' guide to callbacks does."""
    if len(set(scales)) == 1:
        return report

    def switch(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if report is not None:
            report(pipeline, step, timestep, tensors)
        if step + 1 < len(scales) and scales[step + 1] != scales[step]:
            pipeline._guidance_scale = scales[step + 1]
            tensors["prompt_embeds"] = torch.cat([unprompted, prompted]) if scales[step + 1] > 1 else prompted
        return tensors

    return switch


def _step_reporter(progress: Callable[[int, int], None] | None, done: int, pictures: int, total: int) -> StepEnd | None:
    if progress is None:
        return None

    def report(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(done + (step + 1) * pictures, total)
        return tensors

    return report
