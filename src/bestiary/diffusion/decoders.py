"""The decoder of a pipeline: the base's own, or an additional tiny one that was distilled from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestiary.errors import BestiaryError
from bestiary.hub import HubModel, download, is_hub_id
from bestiary.samplers import Sampling

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, StableDiffusionPipeline

ATTRIBUTE = "bestiary_tiny_decoder"


def on_hub(model: str, revision: str | None) -> HubModel:
    """The files of a tiny decoder on the hub."""
    weights = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    return HubModel("tiny decoder", model, revision, ("config.json",), weights, key="tiny_decoder")


def find_tiny_decoder(model: str, revision: str | None) -> str:
    """The folder of a tiny decoder, downloaded if it is on the hub. Raises BestiaryError when the download fails."""
    return model if Path(model).is_dir() or not is_hub_id(model) else str(download(on_hub(model, revision)))


def load_tiny_decoder(model: str, revision: str | None, pipeline: StableDiffusionPipeline) -> AutoencoderTiny:
    """Load a tiny decoder in the pipeline's dtype and on its device.

    Raises BestiaryError when it cannot be loaded or does not fit the base's latents.
    """
    from diffusers import AutoencoderTiny

    folder = find_tiny_decoder(model, revision)
    try:
        vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=pipeline.unet.dtype, local_files_only=True)
    except Exception as error:  # diffusers and safetensors raise different types
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise BestiaryError(
            f"tiny_decoder {model!r} cannot be loaded: {reason}. Set another in params.yaml, or null."
        ) from error
    channels = pipeline.unet.config.in_channels
    if vae.config.latent_channels != channels:
        raise BestiaryError(
            f"tiny_decoder {model!r} decodes {vae.config.latent_channels} latent channels, but the base has "
            f"{channels}. Set another in params.yaml, or null."
        )
    factor = 2 ** (len(vae.config.decoder_block_out_channels) - 1)
    if factor != pipeline.vae_scale_factor:
        raise BestiaryError(
            f"tiny_decoder {model!r} enlarges latents {factor} times, but the base's decoder "
            f"{pipeline.vae_scale_factor} times. Set another in params.yaml, or null."
        )
    return vae.to(pipeline.device).eval().requires_grad_(False)


def add_tiny_decoder(pipeline: StableDiffusionPipeline, decoder: AutoencoderTiny) -> None:
    """Decode pictures whose sampling names the tiny decoder with this one. The base's own decodes all others."""
    setattr(pipeline, ATTRIBUTE, decoder)


def has_tiny_decoder(pipeline: StableDiffusionPipeline) -> bool:
    """Whether `add_tiny_decoder` has added one."""
    return getattr(pipeline, ATTRIBUTE, None) is not None


def decoder_of(pipeline: StableDiffusionPipeline, sampling: Sampling) -> Any:
    """The autoencoder that decodes a picture with this sampling.

    Raises BestiaryError when the pipeline does not have that decoder.
    """
    only = getattr(pipeline.vae, "kind", None)  # set for an export, which has only one decoder
    if only not in (None, sampling.decoder):
        raise BestiaryError(
            f"This export has only the {only} decoder. Draw with --decoder {only}, or export the adapter again."
        )
    if only or sampling.decoder == "full":
        return pipeline.vae
    tiny = getattr(pipeline, ATTRIBUTE, None)
    if tiny is None:
        raise BestiaryError(
            "There is no tiny decoder for this base. Set tiny_decoder in params.yaml, or use --decoder full."
        )
    return tiny


def without_tiny(sampling: Sampling) -> Sampling:
    """The same sampling with the base's own decoder."""
    return replace(sampling, decoder="full")
