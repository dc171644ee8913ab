"""The adapter in a base: LoRA weights (Hu et al. 2021, arXiv:2106.09685) added, saved, applied and verified.

Loaders silently skip whatever does not match. Here a load counts only when every weight of the file is in the UNet or
the text encoder afterwards and every module that the config names has its weights in the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from bestiary.diffusion.adapter_config import is_target
from bestiary.diffusion.adapter_format import (
    FILE_NAME,
    PART_NAMES,
    AdapterConfig,
    AdapterContent,
    Part,
    Provenance,
    spread,
)
from bestiary.diffusion.adapter_reading import SUPPORTED_FAMILIES, read_adapter
from bestiary.diffusion.base import base_sha256, load_text, load_unet
from bestiary.diffusion.stored_adapter import adapter_file, deciding_files
from bestiary.diffusion.weight_changes import (
    WeightChange,
    add_changes,
    misfit,
    remove_changes,
    set_change_weights,
    unknown_modules,
)
from bestiary.errors import BestiaryError, shown
from bestiary.files import write_atomically

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

NAME = "bestiary"  # the adapter's name inside a network; of several, the later ones are bestiary_1, bestiary_2, ...
Networks = Mapping[Part, torch.nn.Module]


@dataclass(frozen=True)
class Applied:
    """How many modules of each network an adapter changes. Every module of its file is one of them."""

    unet: int
    text_encoder: int
    keys: int  # the file's tensors, all of them in place

    def __str__(self) -> str:
        """The modules by part, in words.

        >>> str(Applied(unet=192, text_encoder=72, keys=528))
        'applied 264 of 264 modules: 192 of the UNet, 72 of the text encoder'
        """
        total = self.unet + self.text_encoder
        counts = {"UNet": self.unet, "text encoder": self.text_encoder}
        by_part = ", ".join(f"{count} of the {part}" for part, count in counts.items() if count)
        return f"applied {total} of {total} modules: {by_part}"


@dataclass(frozen=True)
class Verification:
    """The facts about an adapter that `verify_adapter` has proved to apply."""

    rank: int
    alpha: float
    alpha_rule: str | None  # where the alpha is from, when the file does not store it
    applied: Applied
    sha256: str
    base_is_the_trained_one: bool | None  # None: the file does not say what it was trained on
    ranks: str  # of all modules, in words
    alphas: str

    @property
    def keys(self) -> int:
        """The number of weights, all of them in place."""
        return self.applied.keys


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
            raise BestiaryError(
                f"The base's UNet has no module {target!r} to adapt. Remove it from the targets in params.yaml."
            )
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
    apply_adapters(pipeline, [path], [weight])


def apply_adapters(
    pipeline: StableDiffusionPipeline, paths: Sequence[str | Path], weights: Sequence[float]
) -> list[Applied]:
    """Apply several adapters at once, each with its weight, in place of any other; none of them gives the base.

    Returns what was applied of each. Raises BestiaryError that names what does not fit; the pipeline is then the base.
    """
    remove(pipeline)
    networks = _networks(pipeline)
    applied = [_add(networks, path, _name(position)) for position, path in enumerate(paths)]
    set_weights(pipeline, weights)
    return applied


def set_weight(pipeline: StableDiffusionPipeline, weight: float) -> None:
    """Set the weight of the applied adapter: 0 gives exactly the base, 1 the adapter as trained."""
    set_weights(pipeline, [weight])


def set_weights(pipeline: StableDiffusionPipeline, weights: Sequence[float]) -> None:
    """Set the weight of each applied adapter, in the order in which they were applied."""
    _set_weights(_networks(pipeline), weights)


def remove(pipeline: StableDiffusionPipeline) -> None:
    """Remove every adapter, so that the pipeline is the base again."""
    _remove(_networks(pipeline))


@torch.inference_mode()
def verify_adapter(path: str | Path, base: str | Path, revision: str | None = None) -> Verification:
    """Prove on a fresh copy of the base that the adapter applies.

    Every weight is in place, weight 0 gives exactly the base's output, weight 1 does not, and loading the adapter
    again gives the same output. Raises BestiaryError that names the first of these that fails.
    """
    file = adapter_file(path)
    unet = load_unet(base, revision)
    content = read_adapter(file, family=base_family(unet))
    networks: dict[Part, torch.nn.Module] = {"unet": unet}
    if "text_encoder" in content.parts:
        networks["text_encoder"] = load_text(base, revision)[1]
    plain = _probe(networks)
    applied = _add(networks, file, NAME)
    _set_weights(networks, [1.0])
    adapted = _probe(networks)
    if not all(torch.isfinite(output).all() for output in adapted):
        raise BestiaryError(f"The adapter {path} gives values that are not finite numbers on {base}.")
    _set_weights(networks, [0.0])
    if not _equal(_probe(networks), plain):
        raise BestiaryError(f"The adapter {path} changes the output of {base} even with weight 0.")
    for part, before, after in zip(networks, plain, adapted, strict=True):
        if part in content.parts and torch.equal(before, after):
            on = f"{base}" if len(content.parts) == 1 else f"the {PART_NAMES[part]} of {base}"
            raise BestiaryError(f"The adapter {path} has no effect on {on}. Train it again, or use another adapter.")
    _remove(networks)
    _add(networks, file, NAME)
    _set_weights(networks, [1.0])
    if not _equal(_probe(networks), adapted):
        raise BestiaryError(f"The adapter {path} gives another output when it is loaded a second time.")
    trained_on = content.provenance.base_sha256
    return Verification(
        rank=content.config.r,
        alpha=content.config.lora_alpha,
        alpha_rule=content.alpha_rule,
        applied=applied,
        sha256=adapter_sha256(file),
        base_is_the_trained_one=None if trained_on is None else trained_on == base_sha256(base, revision),
        ranks=spread(content.ranks),
        alphas=spread(content.alphas),
    )


def fit(networks: Networks, content: AdapterContent) -> str | None:
    """Why an adapter does not fit the networks of a base; None when it does."""
    for part in content.parts:
        weights, config = content.lora(part)
        if weights and config and (problem := _misfit(networks[part], weights, config, PART_NAMES[part])):
            return problem
        changes = _changes(content, part)
        if unknown := unknown_modules(networks[part], changes):
            return f"it changes {shown(unknown[0], 120)}, which the {PART_NAMES[part]} does not have"
        if problem := misfit(networks[part], changes):
            return problem
    return None


def _networks(pipeline: StableDiffusionPipeline) -> Networks:
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


def _changes(content: AdapterContent, part: Part) -> dict[str, WeightChange]:
    return {module: change for (of, module), change in content.changes.items() if of == part}


def _remove(networks: Networks) -> None:
    from diffusers.utils import recurse_remove_peft_layers

    for network in networks.values():
        remove_changes(network)
        if getattr(network, "peft_config", None):
            recurse_remove_peft_layers(network)
            del network.peft_config
            network._hf_peft_config_loaded = False  # type: ignore[assignment]


def _name(position: int) -> str:
    return f"{NAME}_{position}" if position else NAME


def _add(networks: Networks, path: str | Path, name: str) -> Applied:
    """Load the adapter beside those that are there. It takes effect with `_set_weights`."""
    content = read_adapter(adapter_file(path), family=base_family(networks["unet"]))
    problem = fit(networks, content)
    if problem:
        _remove(networks)
        trained_on = f"; it was trained on {shown(content.provenance.base)}" if content.provenance.base else ""
        raise BestiaryError(f"The adapter {path} does not fit the base: {problem}{trained_on}.")
    keys = 0
    for part in content.parts:
        weights, config = content.lora(part)
        if weights and config and not _add_lora(networks[part], weights, config, name):
            _remove(networks)
            raise BestiaryError(
                f"The adapter {path} did not load: its weights are not in the {PART_NAMES[part]} afterwards."
            )
        changes = _changes(content, part)
        add_changes(networks[part], name, changes)
        keys += len(weights) + sum(len(change.tensors) for change in changes.values())
    return Applied(len(content.modules("unet")), len(content.modules("text_encoder")), keys)


def _add_lora(network: torch.nn.Module, weights: Mapping[str, torch.Tensor], config: AdapterConfig, name: str) -> bool:
    """Load LoRA weights into a network; return whether each of them is in it afterwards."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    named = {_own_name(network, key): value for key, value in weights.items()}
    fields = config.model_dump()
    for field in ("target_modules", "rank_pattern", "alpha_pattern"):
        of = fields[field]
        fields[field] = (
            [_own_name(network, module) for module in of]
            if isinstance(of, list)
            else {_own_name(network, module): value for module, value in of.items()}
        )
    inject_adapter_in_model(LoraConfig(**fields), network, adapter_name=name, state_dict=named)
    set_peft_model_state_dict(network, named, name)
    network._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers' methods look for it
    loaded = get_peft_model_state_dict(network, adapter_name=name)
    network.eval()  # peft adds dropout in training mode, whatever mode the network is in
    network.requires_grad_(False)
    return loaded.keys() == named.keys() and all(
        torch.equal(loaded[key].cpu(), value.to(loaded[key].dtype)) for key, value in named.items()
    )


def _own_name(network: torch.nn.Module, name: str) -> str:
    """A module's or weight's name in this network: recent versions of transformers have no `text_model` in it."""
    return name if hasattr(network, "text_model") else name.removeprefix("text_model.")


def _set_weights(networks: Networks, weights: Sequence[float]) -> None:
    from diffusers.utils import set_adapter_layers, set_weights_and_activate_adapters

    # With a weight of 0, DoRA's trained magnitudes would still change the output.
    active = {_name(position): weight for position, weight in enumerate(weights) if weight != 0}
    for network in networks.values():
        set_change_weights(network, active)
        loras = getattr(network, "peft_config", None)
        if not loras or not weights:
            continue
        names = [name for name in active if name in loras]
        set_adapter_layers(network, enabled=bool(names))
        if names:
            set_weights_and_activate_adapters(network, names, [active[name] for name in names])


def _misfit(
    network: torch.nn.Module, weights: Mapping[str, torch.Tensor], config: AdapterConfig, part: str
) -> str | None:
    """Why the LoRA does not fit the network; None when it does."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in _targeted(network, config.target_modules).items():
        features_out, features_in, *kernel = module.weight.shape  # a linear layer has no kernel
        rank = config.rank_of(name)
        expected[f"{name}.lora_A.weight"] = (rank, features_in, *kernel)
        expected[f"{name}.lora_B.weight"] = (features_out, rank, *(1 for _ in kernel))
        if config.use_dora:
            expected[f"{name}.lora_magnitude_vector"] = (features_out,) if not kernel else (1, features_out, 1, 1)
    unknown = sorted(weights.keys() - expected.keys())
    missing = sorted(expected.keys() - weights.keys())
    if unknown:
        example = shown(unknown[0], 120)
        return f"{len(unknown)} of its {len(weights)} weights match no module of the {part}, for example {example}"
    if missing:
        return f"it lacks {len(missing)} weights, for example {missing[0]}"
    for key, shape in expected.items():
        if tuple(weights[key].shape) != shape:
            return f"{key} has the shape {tuple(weights[key].shape)} instead of {shape}"
    return None


def _targeted(network: torch.nn.Module, targets: Sequence[str]) -> dict[str, torch.nn.Linear | torch.nn.Conv2d]:
    """The modules that PEFT adapts for these targets, also where it has wrapped them for another adapter already."""
    names = frozenset(targets)
    modules = [(name.removesuffix(".base_layer"), module) for name, module in network.named_modules()]
    return {
        _file_name(network, name): module
        for name, module in modules
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and is_target(_file_name(network, name), names)
    }


def _file_name(network: torch.nn.Module, name: str) -> str:
    """A module's name as adapters' files have it: the counterpart of `_own_name`."""
    flat = name.startswith("encoder.layers.") and not hasattr(network, "text_model")
    return f"text_model.{name}" if flat else name


def base_family(unet: UNet2DConditionModel) -> str:
    """The family of models that a base belongs to, as error messages name it."""
    return SUPPORTED_FAMILIES[1 if unet.config.cross_attention_dim == 1024 else 0]


@torch.no_grad()
def _probe(networks: Networks) -> list[torch.Tensor]:
    """Each network's output for one fixed input, small enough for any machine: (1, C, h, w), (1, T, D)."""
    unet = cast("UNet2DConditionModel", networks["unet"])
    generator = torch.Generator().manual_seed(0)
    side = min(unet.config.sample_size, 32)
    latents = torch.randn(1, unet.config.in_channels, side, side, generator=generator)
    text = torch.randn(1, 4, unet.config.cross_attention_dim, generator=generator)
    outputs: list[torch.Tensor] = [unet(latents, torch.tensor([500]), text).sample]
    if encoder := networks.get("text_encoder"):
        outputs.append(encoder(torch.arange(4)[None]).last_hidden_state)
    return outputs


def _equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
