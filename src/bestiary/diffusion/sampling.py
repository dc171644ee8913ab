"""Pictures from prompts and seeds: the same prompt and seed give the same picture, whatever else is drawn beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bestiary.diffusion.base import encode_text
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionPipeline
    from PIL.Image import Image

SCHEDULERS = ("ddpm", "ddim", "dpmsolver++", "unipc", "euler")


def make_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """The sampler `name` on the noise schedule of a base's scheduler `config`.

    ddpm: arXiv:2006.11239, ddim: arXiv:2010.02502, dpmsolver++: arXiv:2211.01095, unipc: arXiv:2302.04867,
    euler: arXiv:2206.00364. Raises BestiaryError for an unknown name.
    """
    import diffusers

    # Latents are not bound to [-1, 1], as the first two would have it unless told.
    match name:
        case "ddpm":
            return diffusers.DDPMScheduler.from_config(config, clip_sample=False)
        case "ddim":
            return diffusers.DDIMScheduler.from_config(config, clip_sample=False)
        case "dpmsolver++":
            return diffusers.DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
        case "unipc":
            return diffusers.UniPCMultistepScheduler.from_config(config)
        case "euler":
            return diffusers.EulerDiscreteScheduler.from_config(config)
    raise BestiaryError(f"There is no scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}.")


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
    resolution: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Image]:
    """One picture for each prompt with its seed, `resolution` pixels a side (None: the base's own).

    All randomness of picture i comes from torch.Generator("cpu").manual_seed(seeds[i]). The prompts' features are
    computed once. `progress(done, total)` is called after each denoising step, in steps times pictures; what it raises
    stops the work.
    """
    side = resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if side % pipeline.vae_scale_factor:
        raise BestiaryError(f"The resolution {side} is not a multiple of {pipeline.vae_scale_factor}.")
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    texts = ["", *dict.fromkeys(prompts)]
    features = encode_text(pipeline.tokenizer, pipeline.text_encoder, texts)  # (B, T, D), the first is unconditional
    shape = (pipeline.unet.config.in_channels, side // pipeline.vae_scale_factor, side // pipeline.vae_scale_factor)
    images: list[Image] = []
    jobs = list(zip(prompts, seeds, strict=True))
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in batch]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])  # (B, C, h, w)
        report = _step_reporter(progress, start * steps, len(batch), len(jobs) * steps)
        latents = pipeline(
            prompt_embeds=features[[texts.index(prompt) for prompt, _ in batch]],
            negative_prompt_embeds=features[[0] * len(batch)],
            latents=noise.to(pipeline.device, pipeline.unet.dtype),
            generator=generators,  # for the schedulers that draw more noise on the way
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=side,
            width=side,
            callback_on_step_end=report,
            output_type="latent",
        ).images
        # While an adapter trains in half precision, its UNet answers in float32.
        latents = latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
        images.extend(pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample))
    return images


def _step_reporter(
    progress: Callable[[int, int], None] | None, done: int, pictures: int, total: int
) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None:
    if progress is None:
        return None

    def report(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(done + (step + 1) * pictures, total)
        return tensors

    return report
