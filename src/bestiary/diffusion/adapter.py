"""The adapter: LoRA weights with their config (Hu et al. 2021, arXiv:2106.09685), put in, saved, applied and verified.

Saved in diffusers' pipeline format. Loaders pass over what does not match in silence; here a load counts only when
every weight of the file is in the UNet and every module that the config names is in the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bestiary.diffusion.base import base_sha256, load_unet
from bestiary.errors import BestiaryError
from bestiary.files import write_atomically

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

NAME = "bestiary"
FILE_NAME = "pytorch_lora_weights.safetensors"
CONFIG_KEY = "lora_adapter_metadata"  # where diffusers looks for the config; without it alpha is taken for the rank
PROVENANCE_KEY = "bestiary"
CONFIG_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
WEIGHT_TYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
MOST = 1e6  # rank or alpha; beyond it is nonsense, and float16 ends long before
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no file can hold


@dataclass(frozen=True)
class Verification:
    """What `verify_adapter` found to be true."""

    rank: int
    alpha: float
    keys: int
    sha256: str
    base_is_the_trained_one: bool | None  # None: the file does not say what it was trained on
    scale_zero_equals_base: bool = True
    scale_one_differs: bool = True
    reload_equals: bool = True


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
    """Put a fresh adapter, which changes nothing yet, into `unet` and return its trainable float32 parameters.

    The rest of the UNet is frozen. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al. 2024,
    arXiv:2402.09353.
    Raises BestiaryError for a target that no module of the UNet has.
    """
    from peft import LoraConfig

    for target in targets:
        if not _targeted(unet, [target]):
            raise BestiaryError(f"The base's UNet has no module {target!r} to adapt.")
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
        parameter.data = parameter.data.float()  # in half precision a small learning rate would not move them
    return parameters


def save_adapter(unet: UNet2DConditionModel, folder: Path, provenance: Mapping[str, Any]) -> Path:
    """Write the UNet's adapter, its config and `provenance` to `folder`; the same adapter gives the same bytes.

    Raises BestiaryError when the disk is full.
    """
    from peft import get_peft_model_state_dict

    weights = {
        f"unet.{key}": value.detach().cpu().contiguous()
        for key, value in get_peft_model_state_dict(unet, adapter_name=NAME).items()
    }
    config = {f"unet.{field}": getattr(unet.peft_config[NAME], field) for field in CONFIG_FIELDS}
    config["unet.target_modules"] = sorted(config["unet.target_modules"])
    metadata = {
        "format": "pt",
        CONFIG_KEY: json.dumps(config, sort_keys=True),
        PROVENANCE_KEY: json.dumps(provenance, sort_keys=True),
    }
    path = folder / FILE_NAME
    write_atomically(path, with_sorted_header(save(weights, metadata)))
    return path


def adapter_file(path: str | Path) -> Path:
    """The adapter's file: `path` itself, or the one in the folder `path`. Raises BestiaryError when there is none."""
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise BestiaryError(f"There is no adapter at {path}.")
    return file


def adapter_sha256(path: str | Path) -> str:
    """SHA-256 of the adapter's file."""
    with adapter_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What the adapter was made from, as `save_adapter` was told; empty for one that was made elsewhere."""
    return dict(_read(adapter_file(path))[2])


def check_trained_on(path: str | Path, base: str, revision: str | None = None) -> None:
    """Raise BestiaryError when the adapter says that it was trained on another base than this one.

    A base of the same shapes would take it without a word, and draw wrongly.
    """
    trained_on = read_provenance(path).get("base_sha256")
    if trained_on is not None and trained_on != base_sha256(base, revision):
        raise BestiaryError(f"The adapter in {path} was trained on another base than {base}: run `dvc repro`.")


def apply_adapter(pipeline: StableDiffusionPipeline, path: str | Path, scale: float = 1.0) -> None:
    """Put the adapter at `path` into the pipeline, in place of the one there, at `scale`; all of it or nothing.

    Raises BestiaryError that says what does not fit.
    """
    _apply(pipeline.unet, path)
    set_scale(pipeline, scale)


def set_scale(pipeline: StableDiffusionPipeline, scale: float) -> None:
    """Set how strongly the applied adapter works: 0 gives the base exactly, 1 the adapter as it was trained."""
    _scale(pipeline.unet, scale)


def remove(pipeline: StableDiffusionPipeline) -> None:
    """Take the adapter out; the pipeline is the base again."""
    if NAME in getattr(pipeline.unet, "peft_config", {}):
        pipeline.unet.unload_lora()


@torch.inference_mode()
def verify_adapter(path: str | Path, base: str | Path, revision: str | None = None) -> Verification:
    """Prove on a fresh copy of the base that the adapter applies: every weight matched, scale 0 gives the base's
    output exactly, scale 1 does not, and a reload gives the same output again.

    Raises BestiaryError that names the first of these that is not so.
    """
    file = adapter_file(path)
    _, config, provenance = _read(file)
    unet = load_unet(base, revision)
    plain = _probe(unet)
    weights = _apply(unet, file)
    adapted = _probe(unet)
    if not torch.isfinite(adapted).all():
        raise BestiaryError(f"The adapter {path} gives values that are not finite numbers.")
    _scale(unet, 0.0)
    if not torch.equal(_probe(unet), plain):
        raise BestiaryError(f"The adapter {path} at scale 0 does not give the base's output.")
    if torch.equal(adapted, plain):
        raise BestiaryError(f"The adapter {path} changes nothing: at scale 1 it gives the base's output.")
    _apply(unet, file)
    if not torch.equal(_probe(unet), adapted):
        raise BestiaryError(f"The adapter {path} gives another output when it is loaded again.")
    trained_on = provenance.get("base_sha256")
    return Verification(
        rank=config["r"],
        alpha=config["lora_alpha"],
        keys=weights,
        sha256=adapter_sha256(file),
        base_is_the_trained_one=None if trained_on is None else trained_on == base_sha256(base, revision),
    )


def _apply(unet: UNet2DConditionModel, path: str | Path) -> int:
    """Load the adapter into `unet` at scale 1 and return how many of its weights are there: all."""
    from peft import get_peft_model_state_dict

    weights, config, provenance = _read(adapter_file(path))
    if NAME in getattr(unet, "peft_config", {}):
        unet.unload_lora()
    problem = _misfit(unet, weights, config)
    if problem:
        trained_on = f"; it was trained on {provenance['base']}" if provenance.get("base") else ""
        raise BestiaryError(f"The adapter {path} does not fit the base: {problem}{trained_on}.")
    unet.load_lora_adapter(
        {f"unet.{key}": value for key, value in weights.items()},
        prefix="unet",
        metadata={f"unet.{field}": value for field, value in config.items()},
        adapter_name=NAME,
    )
    loaded = get_peft_model_state_dict(unet, adapter_name=NAME)
    if loaded.keys() != weights.keys() or not all(
        torch.equal(loaded[key].cpu(), value.to(loaded[key].dtype)) for key, value in weights.items()
    ):
        unet.unload_lora()
        raise BestiaryError(f"The adapter {path} did not load: its weights are not in the UNet afterwards.")
    unet.requires_grad_(False)
    return len(weights)


def _scale(unet: UNet2DConditionModel, scale: float) -> None:
    if scale == 0:
        unet.disable_lora()  # DoRA's trained magnitudes would work on at scale 0
    else:
        unet.enable_lora()
        unet.set_adapters([NAME], [scale])


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """The weights and the config, both without their "unet." prefix, and the provenance."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        config = json.loads(metadata.get(CONFIG_KEY, "{}"))
        provenance = json.loads(metadata.get(PROVENANCE_KEY, "{}"))
    except (RecursionError, ValueError):  # JSON that is none, too deep, or with a number too long for Python
        raise BestiaryError(f"The adapter {file} has a broken config.") from None
    except (SafetensorError, OSError) as error:
        raise BestiaryError(f"{file} is not a readable safetensors file ({error}).") from None
    # Strangers write such files, too: nothing in the header is what it should be until it was looked at.
    if not (isinstance(config, dict) and isinstance(provenance, dict) and is_plain(provenance)):
        raise BestiaryError(f"The adapter {file} has a broken config.")
    if not {"unet.r", "unet.lora_alpha", "unet.target_modules"} <= config.keys():
        raise BestiaryError(
            f"The adapter {file} does not say its rank, alpha and targets, so its strength is unknown; "
            "`bestiary adapter convert` reads other formats."
        )
    config = {key.removeprefix("unet."): value for key, value in config.items()}
    if not is_config(config):
        raise BestiaryError(f"The adapter {file} has a broken config.")
    if is_uneven(config):
        raise BestiaryError(f"{file} gives its modules different ranks or alphas, which is not supported.")
    config = {field: config[field] for field in CONFIG_FIELDS if field in config}  # all that decides what it draws
    if not weights:
        raise BestiaryError(f"{file} holds no LoRA weights.")
    foreign = next((key for key in weights if not key.startswith("unet.")), None)
    if foreign:
        raise BestiaryError(f"The adapter {file} is not in diffusers' pipeline format: it holds {foreign}.")
    check_weights(weights, file)
    return {key.removeprefix("unet."): value for key, value in weights.items()}, config, provenance


def check_weights(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Raise BestiaryError when a weight is not finite, or of a type that a UNet cannot take as it is."""
    for key, weight in weights.items():
        if weight.dtype not in WEIGHT_TYPES:
            raise BestiaryError(f"{file} holds {key} as {str(weight.dtype).removeprefix('torch.')}: not supported.")
        if not torch.isfinite(weight).all():
            raise BestiaryError(f"{file} holds values that are not finite numbers: {key}.")


def is_plain(provenance: Mapping[str, Any]) -> bool:
    """Whether a stranger's provenance has the types that it should have."""
    values = [provenance.get(key) for key in ("base", "base_revision", "base_sha256")]
    return all(value is None or (isinstance(value, str) and SURROGATE.search(value) is None) for value in values)


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether a stranger's LoRA config has the types and the ranges that it should have."""
    rank, alpha, targets = (config[key] for key in ("r", "lora_alpha", "target_modules"))
    dropout = config.get("lora_dropout", 0.0)
    return (
        isinstance(rank, int)
        and 1 <= rank <= MOST
        and isinstance(alpha, (int, float))
        and abs(alpha) <= MOST
        and isinstance(dropout, (int, float))
        and 0 <= dropout <= 1
        and isinstance(targets, list)
        and all(isinstance(target, str) for target in targets)
        and all(isinstance(config.get(key, False), bool) for key in ("use_rslora", "use_dora"))
    )


def is_uneven(config: Mapping[str, Any]) -> bool:
    """Whether a config gives some modules a rank or an alpha of their own."""
    return bool(config.get("rank_pattern") or config.get("alpha_pattern"))


def _misfit(unet: UNet2DConditionModel, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str | None:
    """What keeps the adapter from fitting the UNet, in words; None when it fits."""
    modules = _targeted(unet, config["target_modules"])
    rank = config["r"]
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in modules.items():
        features_out, features_in, *kernel = module.weight.shape  # a linear layer has no kernel
        expected[f"{name}.lora_A.weight"] = (rank, features_in, *kernel)
        expected[f"{name}.lora_B.weight"] = (features_out, rank, *(1 for _ in kernel))
        if config.get("use_dora"):
            expected[f"{name}.lora_magnitude_vector"] = (features_out,) if not kernel else (1, features_out, 1, 1)
    unknown = sorted(weights.keys() - expected.keys())
    missing = sorted(expected.keys() - weights.keys())
    if unknown:
        return f"{len(unknown)} of its {len(weights)} weights have no place there, the first is {unknown[0]}"
    if missing:
        return f"it lacks {len(missing)} weights, the first is {missing[0]}"
    for key, shape in expected.items():
        if tuple(weights[key].shape) != shape:
            return f"{key} has the shape {tuple(weights[key].shape)} and needs {shape}"
    return None


def _targeted(unet: UNet2DConditionModel, targets: Sequence[str]) -> dict[str, torch.nn.Linear | torch.nn.Conv2d]:
    """The modules that peft adapts for these targets: those whose name is one or ends in one."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and any(name == target or name.endswith(f".{target}") for target in targets)
    }


def _probe(unet: UNet2DConditionModel) -> torch.Tensor:
    """The UNet's output for one fixed input, small enough for any machine: (1, C, h, w)."""
    generator = torch.Generator().manual_seed(0)
    side = min(unet.config.sample_size, 32)
    latents = torch.randn(1, unet.config.in_channels, side, side, generator=generator)
    text = torch.randn(1, 4, unet.config.cross_attention_dim, generator=generator)
    output: torch.Tensor = unet(latents, torch.tensor([500]), text).sample
    return output


def with_sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order: the library writes it in another order each time."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
