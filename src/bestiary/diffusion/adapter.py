"""The adapter in a UNet: LoRA weights (Hu et al. 2021, arXiv:2106.09685) added, saved, applied and verified.

Loaders silently skip whatever does not match. Here a load counts only when every weight of the file is in the UNet
afterwards and every module that the config names has its weights in the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bestiary.diffusion.adapter_format import FILE_NAME, PREFIX, AdapterConfig, AdapterContent, Provenance
from bestiary.diffusion.adapter_reading import SUPPORTED_FAMILIES, is_target, read_adapter
from bestiary.diffusion.base import base_sha256, load_unet
from bestiary.diffusion.stored_adapter import adapter_file, deciding_files
from bestiary.errors import BestiaryError, shown
from bestiary.files import write_atomically

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

NAME = "bestiary"  # the adapter's name inside the UNet; of several, the later ones are bestiary_1, bestiary_2, ...


@dataclass(frozen=True)
class Verification:
    """The facts about an adapter that `verify_adapter` has proved to apply."""

    rank: int
    alpha: float
    alpha_rule: str | None  # where the alpha is from, when the file does not store it
    keys: int  # weights, all of them in place
    sha256: str
    base_is_the_trained_one: bool | None  # None: the file does not say what it was trained on


def inject(
    unet: UNet2DConditionModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    seed: int,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> list[torch.nn.Parameter]:
    """Add a fresh adapter, which changes nothing yet, to `unet` and return its trainable float32 parameters.

    The rest of the UNet is frozen. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al. 2024,
    arXiv:2402.09353.
    Raises BestiaryError when no module of the UNet has the name of a target.
    """
    from peft import LoraConfig

    for target in targets:
        if not _targeted(unet, [target]):
            raise BestiaryError(f"The base's UNet has no module {target!r} to adapt. Remove it from train.targets.")
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=sorted(targets),
            use_rslora=use_rslora,
            use_dora=use_dora,
        )
        unet.add_adapter(config, NAME)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()  # half precision would round the updates of a small learning rate away
    return parameters


def save_adapter(unet: UNet2DConditionModel, folder: Path, provenance: Provenance) -> Path:
    """Write the UNet's adapter with its config and provenance to `folder`. The same adapter gives the same bytes.

    Raises BestiaryError when the disk is full.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(unet, adapter_name=NAME)
    config = unet.peft_config[NAME]
    content = AdapterContent(
        weights={key: value.detach().cpu() for key, value in state.items()},
        config=AdapterConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=sorted(config.target_modules),
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
        ),
        provenance=provenance,
    )
    path = folder / FILE_NAME
    write_atomically(path, content.to_bytes())
    return path


def adapter_sha256(path: str | Path) -> str:
    """SHA-256 of the adapter's file; for PEFT's, of the hashes of the weights and of the config beside them."""
    digests = []
    for part in deciding_files(adapter_file(path)):
        with part.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def read_provenance(path: str | Path) -> Provenance:
    """What the adapter was trained from; without any values for one that another program made.

    Raises BestiaryError when there is no adapter, or its file is broken.
    """
    return read_adapter(adapter_file(path)).provenance


def check_trained_on(path: str | Path, base: str, revision: str | None = None) -> None:
    """Raise BestiaryError when the adapter's file says that it was trained on another base.

    A base with the same shapes would load it without complaint and draw wrong pictures.
    """
    trained_on = read_provenance(path).base_sha256
    if trained_on is not None and trained_on != base_sha256(base, revision):
        raise BestiaryError(f"The adapter in {path} was trained on another base than {base}: run `dvc repro`.")


def apply_adapter(pipeline: StableDiffusionPipeline, path: str | Path, weight: float = 1.0) -> None:
    """Apply the adapter at `path` to the pipeline with this weight, in place of any other.

    Raises BestiaryError that names what does not fit; the pipeline is then the base.
    """
    _apply(pipeline.unet, path)
    set_weight(pipeline, weight)


def apply_adapters(pipeline: StableDiffusionPipeline, paths: Sequence[str | Path], weights: Sequence[float]) -> None:
    """Apply several adapters at once, each with its weight, in place of any other; none of them gives the base.

    Raises BestiaryError that names what does not fit; the pipeline is then the base.
    """
    remove(pipeline)
    for position, path in enumerate(paths):
        _add(pipeline.unet, path, _name(position))
    set_weights(pipeline, weights)


def set_weight(pipeline: StableDiffusionPipeline, weight: float) -> None:
    """Set the weight of the applied adapter: 0 gives exactly the base, 1 the adapter as trained."""
    _set_weights(pipeline.unet, [weight])


def set_weights(pipeline: StableDiffusionPipeline, weights: Sequence[float]) -> None:
    """Set the weight of each applied adapter, in the order in which they were applied."""
    _set_weights(pipeline.unet, weights)


def remove(pipeline: StableDiffusionPipeline) -> None:
    """Remove every adapter, so that the pipeline is the base again."""
    _remove(pipeline.unet)


@torch.inference_mode()
def verify_adapter(path: str | Path, base: str | Path, revision: str | None = None) -> Verification:
    """Prove on a fresh copy of the base that the adapter applies.

    Every weight is in place, weight 0 gives exactly the base's output, weight 1 does not, and loading the adapter
    again gives the same output. Raises BestiaryError that names the first of these that fails.
    """
    file = adapter_file(path)
    content = read_adapter(file)
    unet = load_unet(base, revision)
    plain = _probe(unet)
    keys = _apply(unet, file)
    adapted = _probe(unet)
    if not torch.isfinite(adapted).all():
        raise BestiaryError(f"The adapter {path} gives values that are not finite numbers on {base}.")
    _set_weights(unet, [0.0])
    if not torch.equal(_probe(unet), plain):
        raise BestiaryError(f"The adapter {path} changes the output of {base} even with weight 0.")
    if torch.equal(adapted, plain):
        raise BestiaryError(f"The adapter {path} has no effect on {base}. Train it again, or use another adapter.")
    _apply(unet, file)
    if not torch.equal(_probe(unet), adapted):
        raise BestiaryError(f"The adapter {path} gives another output when it is loaded a second time.")
    trained_on = content.provenance.base_sha256
    return Verification(
        rank=content.config.r,
        alpha=content.config.lora_alpha,
        alpha_rule=content.alpha_rule,
        keys=keys,
        sha256=adapter_sha256(file),
        base_is_the_trained_one=None if trained_on is None else trained_on == base_sha256(base, revision),
    )


def _apply(unet: UNet2DConditionModel, path: str | Path) -> int:
    """Load the adapter into `unet` alone, with weight 1, and return the number of its weights."""
    _remove(unet)
    return _add(unet, path, NAME)


def _remove(unet: UNet2DConditionModel) -> None:
    if getattr(unet, "peft_config", None):
        unet.unload_lora()


def _name(position: int) -> str:
    return f"{NAME}_{position}" if position else NAME


def _add(unet: UNet2DConditionModel, path: str | Path, name: str) -> int:
    """Load the adapter into `unet` beside those that are there, with weight 1; return the number of its weights."""
    from peft import get_peft_model_state_dict

    content = read_adapter(adapter_file(path), family=base_family(unet))
    problem = _misfit(unet, content.weights, content.config)
    if problem:
        _remove(unet)
        trained_on = f"; it was trained on {shown(content.provenance.base)}" if content.provenance.base else ""
        raise BestiaryError(f"The adapter {path} does not fit the base: {problem}{trained_on}.")
    unet.load_lora_adapter(
        {f"{PREFIX}{key}": value for key, value in content.weights.items()},
        prefix="unet",
        metadata={f"{PREFIX}{field}": value for field, value in content.config},
        adapter_name=name,
    )
    loaded = get_peft_model_state_dict(unet, adapter_name=name)
    if loaded.keys() != content.weights.keys() or not all(
        torch.equal(loaded[key].cpu(), value.to(loaded[key].dtype)) for key, value in content.weights.items()
    ):
        _remove(unet)
        raise BestiaryError(f"The adapter {path} did not load: its weights are not in the UNet afterwards.")
    unet.eval()  # peft adds dropout in training mode, whatever mode the UNet is in
    unet.requires_grad_(False)
    return len(content.weights)


def _set_weights(unet: UNet2DConditionModel, weights: Sequence[float]) -> None:
    # With a weight of 0, DoRA's trained magnitudes would still change the output.
    active = {_name(position): weight for position, weight in enumerate(weights) if weight != 0}
    if active:
        unet.enable_lora()
        unet.set_adapters(list(active), list(active.values()))
    elif weights:
        unet.disable_lora()


def _misfit(unet: UNet2DConditionModel, weights: Mapping[str, torch.Tensor], config: AdapterConfig) -> str | None:
    """Why the adapter does not fit the UNet; None when it does."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in _targeted(unet, config.target_modules).items():
        features_out, features_in, *kernel = module.weight.shape  # a linear layer has no kernel
        expected[f"{name}.lora_A.weight"] = (config.r, features_in, *kernel)
        expected[f"{name}.lora_B.weight"] = (features_out, config.r, *(1 for _ in kernel))
        if config.use_dora:
            expected[f"{name}.lora_magnitude_vector"] = (features_out,) if not kernel else (1, features_out, 1, 1)
    unknown = sorted(weights.keys() - expected.keys())
    missing = sorted(expected.keys() - weights.keys())
    if unknown:
        example = shown(unknown[0], 120)
        return f"{len(unknown)} of its {len(weights)} weights match no module of the UNet, for example {example}"
    if missing:
        return f"it lacks {len(missing)} weights, for example {missing[0]}"
    for key, shape in expected.items():
        if tuple(weights[key].shape) != shape:
            return f"{key} has the shape {tuple(weights[key].shape)} instead of {shape}"
    return None


def _targeted(unet: UNet2DConditionModel, targets: Sequence[str]) -> dict[str, torch.nn.Linear | torch.nn.Conv2d]:
    """The modules that PEFT adapts for these targets, also where it has wrapped them for another adapter already."""
    names = frozenset(targets)
    modules = ((name.removesuffix(".base_layer"), module) for name, module in unet.named_modules())
    return {
        name: module
        for name, module in modules
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and is_target(name, names)
    }


def base_family(unet: UNet2DConditionModel) -> str:
    """The family of models that a base belongs to, as error messages name it."""
    return SUPPORTED_FAMILIES[1 if unet.config.cross_attention_dim == 1024 else 0]


def _probe(unet: UNet2DConditionModel) -> torch.Tensor:
    """The UNet's output for one fixed input, small enough for any machine: (1, C, h, w)."""
    generator = torch.Generator().manual_seed(0)
    side = min(unet.config.sample_size, 32)
    latents = torch.randn(1, unet.config.in_channels, side, side, generator=generator)
    text = torch.randn(1, 4, unet.config.cross_attention_dim, generator=generator)
    output: torch.Tensor = unet(latents, torch.tensor([500]), text).sample
    return output
