"""Convert adapters between formats: read diffusers, PEFT, kohya and the original system's pickles; write two of them.

Reading never runs code from a file: pickles are unpickled with nothing but tensors allowed.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bestiary.diffusion.adapter_format import (
    CONFIG_KEY,
    FILE_NAME,
    PREFIX,
    PROVENANCE_KEY,
    AdapterConfig,
    AdapterContent,
    check_weights,
    parse_config,
    parse_provenance,
    read_object,
    with_sorted_header,
)
from bestiary.errors import BestiaryError
from bestiary.files import write_atomically

# Kohya files keep the config under this key: with diffusers' own key, diffusers would take them for its own format.
KOHYA_CONFIG_KEY = "bestiary_config"
KOHYA_PREFIX = "lora_unet_"
# Module names of the UNet that contain underscores themselves: kohya replaces the dots between names by underscores.
COMPOUND_NAMES = (
    "down_blocks|up_blocks|mid_block|transformer_blocks|to_q|to_k|to_v|to_out|proj_in|proj_out|time_emb_proj|"
    "conv_in|conv_out|conv_shortcut|time_embedding|linear_1|linear_2"
)
ORIGINAL_ALPHA = 16.0  # of the original system, whose files do not store it
DEFAULT_RESOLUTION = 512  # what Stable Diffusion v1 was trained at
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class _File:
    """An adapter's file as stored."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    header: Mapping[str, str]
    config: Mapping[str, Any]  # untrusted JSON: the LoRA config, as far as there is one
    default_alpha: float | None


def convert(source: Path, target: Path, to: Literal["diffusers", "kohya"], alpha: float | None = None) -> Path:
    """Write the adapter `source` in the format `to` and return the file.

    `target` is a .safetensors file or a folder. `alpha` is for files that do not store their own; the original
    system's files get 16 by default.
    Raises BestiaryError when the source is not a LoRA of a UNet, when its alpha is unknown, or when it is a DoRA
    and the target is a kohya file, which cannot hold it exactly.
    """
    if target.suffix not in ("", ".safetensors"):
        raise BestiaryError(f"{target} is neither a folder nor a .safetensors file. Choose another name.")
    adapter = read(source, alpha)
    if to == "diffusers":
        name, data = FILE_NAME, adapter.to_bytes()
    else:
        name, data = f"{source.stem}.safetensors", _kohya(adapter, source)
    file = target if target.suffix == ".safetensors" else target / name
    write_atomically(file, data)
    return file


def is_kohya(path: Path) -> bool:
    """Whether a file is a safetensors file whose modules are named as kohya's tools name them."""
    try:
        with safe_open(path, framework="pt") as file:
            return any(key.startswith(KOHYA_PREFIX) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def read(path: Path, alpha: float | None = None) -> AdapterContent:
    """Read an adapter in any of the formats; `alpha` is for files that do not store their own.

    Raises BestiaryError when the file is not a complete LoRA of a UNet, or its alpha is unknown.
    """
    file = _open(path, alpha)
    weights: dict[str, torch.Tensor] = {}
    alphas: list[float] = []  # kohya stores one for each module
    for key, tensor in file.tensors.items():
        if not key.endswith(".alpha"):
            name = _weight_name(key, file.path)
            if name in weights:
                raise BestiaryError(f"{file.path} holds {name} twice, under two names.")
            weights[name] = tensor
        elif tensor.numel() == 1 and not tensor.is_complex():
            alphas.append(float(tensor))
    check_weights(weights, file.path)
    modules = _adapted_modules(weights, file.path)
    ranks = {weights[module + DOWN].shape[0] for module in modules if weights[module + DOWN].ndim > 1}
    if not ranks:
        raise BestiaryError(f"{file.path} holds no LoRA weights.")
    some_lack_alpha = bool(alphas) and len(alphas) < len(modules)
    if len(ranks) > 1 or len(set(alphas)) > 1 or some_lack_alpha:
        raise BestiaryError(f"{file.path} gives its modules different ranks or alphas, which is not supported.")
    rank = ranks.pop()
    config = _complete_config(file, weights, rank, alphas[0] if alphas else file.default_alpha)
    provenance = parse_provenance(file.header.get(PROVENANCE_KEY), file.path)
    for module in modules:
        down, up = weights[module + DOWN], weights[module + UP]
        if min(down.ndim, up.ndim) < 2 or (down.shape[0], up.shape[1]) != (rank, rank):
            raise BestiaryError(f"{file.path} is broken: the two halves of {module} have different ranks.")
    return AdapterContent(weights, config, provenance)


def _open(path: Path, alpha: float | None) -> _File:
    """Read the tensors and the header of a file, of diffusers' folder or of PEFT's folder with its config."""
    config: dict[str, Any] = {}  # untrusted JSON
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            config = read_object((path / "adapter_config.json").read_bytes(), path)
            whole, pickled = path / "adapter_model.safetensors", path / "adapter_model.bin"
            path = pickled if pickled.is_file() and not whole.is_file() else whole
        else:
            path = path / FILE_NAME
    if not path.is_file():
        raise BestiaryError(f"There is no adapter at {path}.")
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # torch's pickles, whatever the file's name says
    if is_zip:
        return _File(path, _read_pickle(path), {}, config, alpha or ORIGINAL_ALPHA)
    tensors, header = _read_safetensors(path)
    config |= read_object(header.get(KOHYA_CONFIG_KEY), path)
    config |= {key.removeprefix(PREFIX): value for key, value in read_object(header.get(CONFIG_KEY), path).items()}
    return _File(path, tensors, header, config, alpha)


def _adapted_modules(weights: Mapping[str, torch.Tensor], path: Path) -> set[str]:
    """The modules that have weights. Raises BestiaryError when one of them has only half of its weights."""
    halves = [{key.rsplit(half, 1)[0] for key in weights if key.endswith(half)} for half in (DOWN, UP)]
    if halves[0] != halves[1]:
        raise BestiaryError(f"{path} is incomplete: it holds only one half of {min(halves[0] ^ halves[1])}.")
    return halves[0]


def _complete_config(file: _File, weights: Mapping[str, torch.Tensor], rank: int, alpha: float | None) -> AdapterConfig:
    """The stored config, with whatever it lacks taken from the weights."""
    content = {
        **file.config,
        "r": rank,
        "lora_alpha": file.config.get("lora_alpha", alpha),
        "target_modules": file.config.get("target_modules") or sorted({key.rsplit(".lora_", 1)[0] for key in weights}),
    }
    if content["lora_alpha"] is None:
        raise BestiaryError(f"{file.path} does not store its alpha. Give it with `bestiary adapter convert --alpha`.")
    return parse_config(content, file.path)


def _weight_name(key: str, path: Path) -> str:
    """The name of a weight, the same for all formats: `down_blocks.0....to_q.lora_A.weight`."""
    if key.startswith(KOHYA_PREFIX):
        module, _, rest = key.removeprefix(KOHYA_PREFIX).partition(".")
        if not re.match(r"(down_blocks|up_blocks|mid_block|conv|time)_", module):
            raise BestiaryError(
                f"{path} names modules as the first Stable Diffusion code did ({key}), which is not supported."
            )
        parts = re.sub(COMPOUND_NAMES, lambda found: found[0].replace("_", "\0"), module).replace("_", ".")
        key = f"{parts.replace(chr(0), '_')}.{rest}"
    key = key.removeprefix(PREFIX).removeprefix("base_model.model.").replace(".default.", ".")
    key = re.sub(r"\.(?:lora\.down|lora_down)\.weight$", DOWN, key)
    key = re.sub(r"\.(?:lora\.up|lora_up)\.weight$", UP, key)
    in_unet = re.match(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding)\.", key)
    if not in_unet or not key.endswith((DOWN, UP, ".lora_magnitude_vector")):
        raise BestiaryError(f"{path} holds more than a UNet's LoRA, which is not supported: {key}.")
    return key


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BestiaryError(f"{path} is not a readable safetensors file ({error}).") from None


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:  # given a path, torch would choose the format by its suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BestiaryError(f"{path} holds code or objects besides tensors, so it was not read.") from None
    except Exception as error:  # torch passes on whatever a broken file makes its parts raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BestiaryError(f"{path} is a broken file ({reason}).") from None
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        raise BestiaryError(f"{path} holds no table of tensors.")
    return content


def _kohya(adapter: AdapterContent, source: Path) -> bytes:
    config = adapter.config
    if config.use_dora:
        raise BestiaryError(f"{source} is a DoRA, which kohya's format cannot hold exactly. Convert it to diffusers.")
    # kohya's tools scale by alpha / rank, so rsLoRA's alpha / sqrt(rank) needs another alpha there.
    alpha = float(config.lora_alpha) * (math.sqrt(config.r) if config.use_rslora else 1.0)
    weights: dict[str, torch.Tensor] = {}
    for key, value in adapter.weights.items():
        module, end = key.rsplit(".lora_", 1)
        name = KOHYA_PREFIX + module.replace(".", "_")
        weights[f"{name}.{'lora_down' if end.startswith('A') else 'lora_up'}.weight"] = value.contiguous()
        weights[f"{name}.alpha"] = torch.tensor(alpha)
    data = save(weights)
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    side = adapter.provenance.resolution or DEFAULT_RESOLUTION
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": adapter.provenance.base or "",
        "ss_output_name": "bestiary",
        "sshs_model_hash": hashlib.sha256(tensors).hexdigest(),  # the hash that A1111 writes into its pictures
        # The fields that ModelSpec 1.0.0 requires: https://github.com/Stability-AI/ModelSpec
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "Bestiary",
        "modelspec.resolution": f"{side}x{side}",
        KOHYA_CONFIG_KEY: json.dumps(dict(config), sort_keys=True),
        PROVENANCE_KEY: adapter.provenance.to_json(),
    }
    return with_sorted_header(save(weights, header))
