"""Show a picture while it is drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

MAX_SIDE = 16  # latents a side; larger ones are shrunk, because decoding them would take longer than the step
MIN_SECONDS = 0.25  # between two previews
MAX_SHARE = 0.1  # of the time


@contextmanager
def previews(
    pipeline: StableDiffusionPipeline,
    guidance_scale: float,
    show: Callable[[Image], None],
    is_wanted: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Inside, call `show` with small pictures of the UNet's current estimate of the result: x0 of arXiv:2010.02502,
    eq. 9.

    All samplers here give the UNet latents of unit variance with their timestep, so one formula fits them all. Previews
    come at most every MIN_SECONDS, take at most a MAX_SHARE of the time, and are made only while `is_wanted`.
    """
    alphas = pipeline.scheduler.alphas_cumprod
    prediction_type = pipeline.scheduler.config.prediction_type
    next_time = 0.0

    def watch(_unet: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # torch's hook: any forward's
        nonlocal next_time
        started = time.monotonic()
        if started < next_time or not is_wanted():
            return
        latents, timestep = inputs[0][-1:], inputs[1]  # (1, C, h, w)
        prediction = output[0][-1:]
        if len(output[0]) == 2:  # classifier-free guidance: unconditional, conditional
            prediction = output[0][:1] + guidance_scale * (prediction - output[0][:1])
        alpha = alphas[int(timestep)].to(latents)
        show(_decode_small(pipeline, _denoised(latents, prediction, alpha, prediction_type)))
        now = time.monotonic()
        next_time = now + max(MIN_SECONDS, (now - started) / MAX_SHARE)

    hook = pipeline.unet.register_forward_hook(watch)
    try:
        yield
    finally:
        hook.remove()


def _denoised(
    latents: torch.Tensor, prediction: torch.Tensor, alpha: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    if prediction_type == "epsilon":
        return (latents - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
    if prediction_type == "v_prediction":
        return alpha.sqrt() * latents - (1 - alpha).sqrt() * prediction
    return prediction


def _decode_small(pipeline: StableDiffusionPipeline, latents: torch.Tensor) -> Image:
    side = min(MAX_SIDE, latents.shape[-1])
    small = torch.nn.functional.interpolate(latents, size=(side, side), mode="area")
    decoded = pipeline.vae.decode(small / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    image: Image = pipeline.image_processor.postprocess(decoded.detach(), output_type="pil")[0]
    return image
