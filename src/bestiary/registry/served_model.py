"""What MLflow's server runs for a registered version. A copy of this file is stored with each version, so it must not
import anything of this package.

It draws as `bestiary generate` does: with the evaluated revision of the base, the sampler, the guidance interval and
the adapter's weight of the evaluation, and the seed's own noise.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

import mlflow
import torch
from mlflow.environment_variables import MLFLOW_DEFAULT_PREDICTION_DEVICE
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel

if TYPE_CHECKING:
    import pandas as pd
    from diffusers import StableDiffusionPipeline
    from mlflow.pyfunc import PythonModelContext

LIMITS = {
    "seed": (0, 2**63 - 1),
    "num_inference_steps": (1, 1000),
    "guidance_scale": (1, 50),
    "height": (8, 4096),
    "width": (8, 4096),
}


class DrawingModel(PythonModel):  # type: ignore[misc]  # MLflow's classes are not typed here
    """Draws a PNG of each prompt. Its config names the base, the sampler, the guidance interval and the weight."""

    def load_context(self, context: PythonModelContext) -> None:
        """Note what to draw with. The base is loaded for the first prompt."""
        self._adapter: str = context.artifacts["adapter"]
        self._config: dict[str, Any] = dict(context.model_config)  # JSON that registering wrote
        self._pipeline: StableDiffusionPipeline | None = None
        self._lock = threading.Lock()  # the pipeline draws one picture at a time

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow warns of hints
        """A PNG of each prompt in a table, with the same seed. Raises MlflowException for what cannot be drawn."""
        check(params)
        with self._lock:
            if self._pipeline is None:
                self._pipeline = load(self._config, self._adapter)
            return [draw(self._pipeline, self._config, prompt, params) for prompt in prompts_of(model_input)]


def prompts_of(table: pd.DataFrame) -> list[str]:
    """The prompts of a request: a cell may hold several. Raises MlflowException when there is none."""
    cells = table["prompt"].tolist()
    prompts = [prompt for cell in cells for prompt in (cell if isinstance(cell, list) else [cell])]
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise MlflowException.invalid_parameter_value("The prompt is empty. Write what to draw.")
    return prompts


def check(params: Mapping[str, Any]) -> None:
    """Raise MlflowException when a parameter is out of range."""
    for name, (low, high) in LIMITS.items():
        if not low <= params[name] <= high:
            raise MlflowException.invalid_parameter_value(
                f"{name} is {params[name]}. Choose a number from {low} to {high}."
            )
    for name in ("height", "width"):
        if params[name] % 8:
            raise MlflowException.invalid_parameter_value(f"{name} is {params[name]}. Choose a multiple of 8.")


def load(config: Mapping[str, Any], adapter: str) -> StableDiffusionPipeline:
    """The base with the adapter, on the best device in the dtype that `bestiary generate` uses there."""
    from diffusers import StableDiffusionPipeline

    device = config["device"] or MLFLOW_DEFAULT_PREDICTION_DEVICE.get() or best_device()
    dtype = torch.float32
    if device.startswith("cuda"):
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    base = config["base_model"]
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            base,
            revision=config["base_model_revision"] or None,
            dtype=dtype,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except OSError as error:
        raise MlflowException(
            f"The base {base} cannot be loaded. Start the server in the folder that the path is relative to, or load "
            "the model with model_config={'base_model': ...}."
        ) from error
    pipeline.load_lora_weights(adapter)
    if config["adapter_weight"] != 1:
        pipeline.set_adapters(pipeline.get_active_adapters(), config["adapter_weight"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def best_device() -> str:
    """The best device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@torch.no_grad()
def draw(pipeline: StableDiffusionPipeline, config: Mapping[str, Any], prompt: str, params: Mapping[str, Any]) -> bytes:
    """A PNG of the prompt. Raises MlflowException when the prompt is too long or the picture is not finite."""
    import diffusers

    steps, width, height = (params[name] for name in ("num_inference_steps", "width", "height"))
    options = dict(config["scheduler_options"])
    if steps == 1 and options["timestep_spacing"] == "linspace":  # of which one point is timestep 0, without noise
        options["timestep_spacing"] = "trailing"
    pipeline.scheduler = getattr(diffusers, config["scheduler"]).from_config(pipeline.scheduler.config, **options)
    scales = guidance_scales(pipeline, config["guidance_interval"], params["guidance_scale"], steps)
    unprompted, prompted = features(pipeline, [params["negative_prompt"], prompt])
    factor = pipeline.vae_scale_factor
    generator = seeded(params["seed"])
    noise = torch.randn((1, pipeline.unet.config.in_channels, height // factor, width // factor), generator=generator)
    latents = pipeline(
        prompt_embeds=prompted,
        negative_prompt_embeds=unprompted,
        latents=noise.to(pipeline.device, pipeline.unet.dtype),
        generator=[generator],
        num_inference_steps=steps,
        guidance_scale=scales[0],
        height=height,
        width=width,
        eta=config["eta"],
        callback_on_step_end=switching(scales, unprompted, prompted),
        output_type="latent",
    ).images
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    if not torch.isfinite(decoded).all():  # as bytes these would silently become black
        raise MlflowException("The picture contains values that are not finite.")
    buffer = BytesIO()
    pipeline.image_processor.postprocess(decoded)[0].save(buffer, "PNG")
    return buffer.getvalue()


def features(pipeline: StableDiffusionPipeline, texts: list[str]) -> tuple[torch.Tensor, ...]:
    """The text encoder's features of each text: (1, T, D). Raises MlflowException when one is too long."""
    longest = pipeline.tokenizer.model_max_length
    for text in texts:
        if (tokens := len(pipeline.tokenizer(text).input_ids)) > longest:
            raise MlflowException.invalid_parameter_value(
                f"This text has {tokens} tokens and the base reads {longest}: {text[:80]!r}. Shorten it."
            )
    ids = pipeline.tokenizer(texts, padding="max_length", max_length=longest, return_tensors="pt").input_ids
    encoded: torch.Tensor = pipeline.text_encoder(ids.to(pipeline.device)).last_hidden_state  # (B, T, D)
    return tuple(encoded[:, None])


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU, other for each seed: torch's own uses only the low 32 bits, so larger ones are hashed."""
    if seed >= 2**32:
        seed = int.from_bytes(hashlib.sha256(seed.to_bytes(8, "little")).digest()[:4], "little")
    return torch.Generator("cpu").manual_seed(seed)


def guidance_scales(
    pipeline: StableDiffusionPipeline, interval: list[float] | None, scale: float, steps: int
) -> list[float]:
    """The guidance scale of each step; 1, which means none, at noise levels outside the interval (arXiv:2404.07724)."""
    if interval is None:
        return [scale] * steps
    pipeline.scheduler.set_timesteps(steps)
    alphas = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps.cpu().round().long()]
    sigmas = ((1 - alphas) / alphas).sqrt().tolist()
    return [scale if interval[0] < sigma <= interval[1] else 1.0 for sigma in sigmas]


def switching(
    scales: list[float], unprompted: torch.Tensor, prompted: torch.Tensor
) -> Callable[..., dict[str, Any]] | None:
    """A callback that switches the pipeline to the next step's guidance, as diffusers' guide to callbacks shows."""
    if len(set(scales)) == 1:
        return None

    def switch(pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < len(scales) and scales[step + 1] != scales[step]:
            pipeline._guidance_scale = scales[step + 1]
            guided = scales[step + 1] > 1
            tensors["prompt_embeds"] = torch.cat([unprompted, prompted]) if guided else prompted
        return tensors

    return switch


mlflow.models.set_model(DrawingModel())
