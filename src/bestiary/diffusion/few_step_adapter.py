"""The few-step adapter: one LoRA with the trained adapter's change and the change that makes a few steps suffice.

One file then draws every pass, and other programs need no second adapter with the right weight. Stacking the LoRAs is
exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.diffusion.adapter import apply_adapter, check_trained_on
from bestiary.diffusion.adapter_format import FILE_NAME, AdapterContent, Provenance
from bestiary.diffusion.adapter_reading import read_adapter
from bestiary.diffusion.few_step import few_step_sampling
from bestiary.diffusion.merging import Parent, merge
from bestiary.diffusion.sampling import is_lcm
from bestiary.diffusion.stored_adapter import adapter_file
from bestiary.errors import BestiaryError, shown
from bestiary.files import is_file, is_folder
from bestiary.hub import HubModel, explain

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from bestiary.params import FewStepModel, Model
    from bestiary.samplers import Sampling


def make_teacher(pipeline: StableDiffusionPipeline, adapter: Path, base: Model) -> None:
    """Add the trained adapter's change to the pipeline's weights.

    Raises BestiaryError when there is no adapter, when it was trained on another base or is not a plain LoRA of the
    UNet, or when the base already draws in a few steps.
    """
    if is_lcm(pipeline):
        raise BestiaryError(
            f"The base {shown(base.model, 200)} is a latent consistency model, which already draws in a few steps. "
            "Distil another base."
        )
    check_trained_on(adapter, base.model, base.revision)
    content = read_adapter(adapter_file(adapter))
    if content.few_step:
        raise BestiaryError(f"{adapter} is already a few-step adapter. Distil the adapter that `train` makes.")
    if content.beyond_unet_lora or content.config.use_dora:
        kind = content.beyond_unet_lora or "DoRA"
        raise BestiaryError(f"{adapter} holds {kind}, but only a plain LoRA of the UNet can be distilled. Train one.")
    apply_adapter(pipeline, adapter)
    pipeline.unet.fuse_lora()
    pipeline.unet.unload_lora()


def combine(
    adapter: Path, difference: Path, weight: float, sampling: Sampling, provenance: Provenance
) -> AdapterContent:
    """The exact sum of the trained adapter and, at this weight, the few-step LoRA in `difference`, as one adapter.

    `sampling` says how to draw with it. Raises BestiaryError when the two cannot be merged.
    """
    parents = [
        Parent(str(adapter), adapter_file(adapter)),
        Parent(str(difference), adapter_file(difference), weight),
    ]
    return replace(merge(parents).content, few_step=sampling, provenance=provenance)


def find_few_step(chosen: FewStepModel, download: Callable[[str, str, str | None], Path] | None = None) -> Path:
    """The file of a few-step adapter in a folder, or on the Hugging Face hub.

    Raises BestiaryError when there is no file or it cannot be downloaded.
    """
    place = Path(chosen.model)
    if is_folder(place):
        return adapter_file(place / chosen.file if chosen.file else place)
    if is_file(place):
        return adapter_file(place)
    file = chosen.file or FILE_NAME
    try:
        return (download or _download)(chosen.model, file, chosen.revision)
    except (OSError, ValueError) as error:
        raise explain(error, on_hub(chosen)) from error


def on_hub(chosen: FewStepModel) -> HubModel:
    """The file of a few-step adapter on the hub."""
    file = chosen.file or FILE_NAME
    return HubModel("few-step adapter", chosen.model, chosen.revision, (file,), weights=(), key="distill.from")


def _download(model: str, file: str, revision: str | None) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.hf_hub_download(model, file, revision=revision))


def sampling_of(chosen: FewStepModel, file: Path) -> Sampling:
    """How to draw with a few-step adapter, from its file or its name.

    Raises BestiaryError when neither does.
    """
    named = [chosen.file or "", Path(chosen.model).name, chosen.model]
    sampling = read_adapter(file).few_step or few_step_sampling([Path(name).stem for name in named[:1]] + named[1:])
    if sampling is None:
        raise BestiaryError(
            f"distill.from: {shown(chosen.model, 200)} does not say how to draw with it. Choose a few-step adapter "
            "whose name says LCM, TCD or Hyper-SD."
        )
    return sampling
