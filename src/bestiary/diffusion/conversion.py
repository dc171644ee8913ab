"""Adapters in everybody else's formats: diffusers, PEFT, kohya, and the pickles of the original system.

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

from bestiary.diffusion.adapter import (
    CONFIG_KEY,
    FILE_NAME,
    PROVENANCE_KEY,
    check_weights,
    is_config,
    is_plain,
    is_uneven,
    with_sorted_header,
)
from bestiary.errors import BestiaryError
from bestiary.files import write_atomically

# In a kohya file under a key of our own: under its usual one, diffusers would take the file for its own format.
KOHYA_CONFIG_KEY = "bestiary_config"
KOHYA_PREFIX = "lora_unet_"
# Names of the UNet's modules that hold an underscore themselves: kohya writes every dot as an underscore, too.
COMPOUND = (
    "down_blocks|up_blocks|mid_block|transformer_blocks|to_q|to_k|to_v|to_out|proj_in|proj_out|time_emb_proj|"
    "conv_in|conv_out|conv_shortcut|time_embedding|linear_1|linear_2"
)
ALPHA_OF_THE_ORIGINAL = 16.0
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Foreign:
    """An adapter as read: weights by module (`....lora_A.weight`), rank and all, and where they come from."""

    weights: dict[str, torch.Tensor]
    config: dict[str, Any]
    provenance: dict[str, Any]


def convert(source: Path, target: Path, to: Literal["diffusers", "kohya"], alpha: float | None = None) -> Path:
    """Write the adapter `source` to `target` (a file, or a folder for diffusers) in the format `to`; returns the file.

    `alpha` is for files that do not store theirs; the original system's was 16, which its own files therefore get.
    Raises BestiaryError for what is no LoRA of a UNet, or does not say how strong it is.
    """
    if target.suffix not in ("", ".safetensors"):
        raise BestiaryError(f"{target} is neither a folder's name nor one that ends in .safetensors.")
    adapter = read(source, alpha)
    if to == "diffusers":
        file = target if target.suffix == ".safetensors" else target / FILE_NAME
        data = _diffusers(adapter)
    else:
        file = target if target.suffix == ".safetensors" else target / f"{source.stem}.safetensors"
        data = _kohya(adapter, source)
    write_atomically(file, with_sorted_header(data))
    return file


def is_kohya(path: Path) -> bool:
    """Whether a file is a safetensors file that names its modules as kohya's tools do."""
    try:
        with safe_open(path, framework="pt") as file:
            return any(key.startswith(KOHYA_PREFIX) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def read(path: Path, alpha: float | None = None) -> Foreign:
    """Read an adapter in any of the formats."""
    config: dict[str, Any] = {}
    if path.is_dir():
        if (path / "adapter_config.json").is_file():  # PEFT's folder
            config = _json((path / "adapter_config.json").read_bytes(), path)
            whole, pickled = path / "adapter_model.safetensors", path / "adapter_model.bin"
            path = pickled if pickled.is_file() and not whole.is_file() else whole
        else:
            path = path / FILE_NAME
    if not path.is_file():
        raise BestiaryError(f"There is no adapter at {path}.")
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    tensors, metadata = (_read_pickle(path), {}) if is_zip else _read_safetensors(path)
    if is_zip:
        alpha = alpha or ALPHA_OF_THE_ORIGINAL
    config |= _json(metadata.get(KOHYA_CONFIG_KEY, "{}"), path)
    config |= {key.removeprefix("unet."): value for key, value in _json(metadata.get(CONFIG_KEY, "{}"), path).items()}
    weights: dict[str, torch.Tensor] = {}
    alphas: list[float] = []  # where the format has them, one for each module
    for key, tensor in tensors.items():
        if not key.endswith(".alpha"):
            name = _module_key(key, path)
            if name in weights:
                raise BestiaryError(f"{path} holds {name} twice, under two names.")
            weights[name] = tensor
        elif tensor.numel() == 1 and not tensor.is_complex():
            alphas.append(float(tensor))
    check_weights(weights, path)
    halves = {half: {key.rsplit(half, 1)[0] for key in weights if key.endswith(half)} for half in (DOWN, UP)}
    if halves[DOWN] != halves[UP]:
        odd = min(halves[DOWN] ^ halves[UP])
        raise BestiaryError(f"{path} is incomplete: it holds one half of {odd} only.")
    ranks = {tensor.shape[0] for key, tensor in weights.items() if key.endswith(DOWN) and tensor.ndim > 1}
    if not ranks:
        raise BestiaryError(f"{path} holds no LoRA weights.")
    some_lack_alpha = bool(alphas) and len(alphas) < len(halves[DOWN])
    if len(ranks) > 1 or len(set(alphas)) > 1 or some_lack_alpha or is_uneven(config):
        raise BestiaryError(f"{path} gives its modules different ranks or alphas, which is not supported.")
    rank = ranks.pop()
    strength = config.get("lora_alpha", alphas[0] if alphas else alpha)
    if strength is None:
        raise BestiaryError(
            f"{path} does not store its alpha, so its strength is unknown: `bestiary adapter convert --alpha` says it."
        )
    complete = {
        "r": rank,
        "lora_alpha": strength,
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": config.get("target_modules") or sorted({key.rsplit(".lora_", 1)[0] for key in weights}),
        "use_rslora": config.get("use_rslora", False),
        "use_dora": config.get("use_dora", False),
    }
    provenance = _json(metadata.get(PROVENANCE_KEY, "{}"), path)
    if not (is_config(complete) and is_plain(provenance)):
        raise BestiaryError(f"{path} has a broken config.")
    for key in halves[DOWN]:
        down, up = weights[key + DOWN], weights[key + UP]
        if min(down.ndim, up.ndim) < 2 or (down.shape[0], up.shape[1]) != (rank, rank):
            raise BestiaryError(f"{path} is broken: the two halves of {key} have different ranks.")
    return Foreign(weights, complete, provenance)


def _module_key(key: str, path: Path) -> str:
    """One name for a weight in all formats: `down_blocks.0....to_q.lora_A.weight`."""
    if key.startswith(KOHYA_PREFIX):
        module, _, rest = key.removeprefix(KOHYA_PREFIX).partition(".")
        if not re.match(r"(down_blocks|up_blocks|mid_block|conv|time)_", module):
            raise BestiaryError(f"{path} names modules as the first Stable Diffusion code did ({key}): not supported.")
        parts = re.sub(COMPOUND, lambda found: found[0].replace("_", "\0"), module).replace("_", ".")
        key = f"{parts.replace(chr(0), '_')}.{rest}"
    key = key.removeprefix("unet.").removeprefix("base_model.model.").replace(".default.", ".")
    key = re.sub(r"\.(?:lora\.down|lora_down)\.weight$", DOWN, key)
    key = re.sub(r"\.(?:lora\.up|lora_up)\.weight$", UP, key)
    unets = re.match(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding)\.", key)
    if not unets or not key.endswith((DOWN, UP, ".lora_magnitude_vector")):
        raise BestiaryError(f"{path} holds something else than a UNet's LoRA: {key}.")
    return key


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BestiaryError(f"{path} is not a readable safetensors file ({error}).") from None


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:  # not by its name, from which torch would take it for what it is not
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BestiaryError(f"{path} holds code or objects besides tensors, so it was not read.") from None
    except Exception as error:  # torch lets through whatever a broken file makes its parts raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BestiaryError(f"{path} is a broken file ({reason}).") from None
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        raise BestiaryError(f"{path} holds no table of tensors.")
    return content


def _json(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise BestiaryError(f"{path} has a broken config.")
    return content


def _diffusers(adapter: Foreign) -> bytes:
    weights = {f"unet.{key}": value.contiguous() for key, value in adapter.weights.items()}
    config = {f"unet.{key}": value for key, value in adapter.config.items()}
    metadata = {"format": "pt", CONFIG_KEY: _dump(config), PROVENANCE_KEY: _dump(adapter.provenance)}
    return save(weights, metadata)


def _kohya(adapter: Foreign, source: Path) -> bytes:
    config = adapter.config
    if config["use_dora"]:
        raise BestiaryError(f"{source} is a DoRA, which has no exact form as a kohya file.")
    # kohya's tools scale by alpha / rank; rsLoRA's alpha / sqrt(rank) is another alpha there.
    alpha = float(config["lora_alpha"]) * (math.sqrt(config["r"]) if config["use_rslora"] else 1.0)
    weights: dict[str, torch.Tensor] = {}
    for key, value in adapter.weights.items():
        module, end = key.rsplit(".lora_", 1)
        name = KOHYA_PREFIX + module.replace(".", "_")
        weights[f"{name}.{'lora_down' if end.startswith('A') else 'lora_up'}.weight"] = value.contiguous()
        weights[f"{name}.alpha"] = torch.tensor(alpha)
    data = save(weights)
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    trained_at = adapter.provenance.get("resolution")
    side = trained_at if isinstance(trained_at, int) else 512  # Stable Diffusion v1's
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": str(adapter.provenance.get("base", "")),
        "ss_output_name": "bestiary",
        "sshs_model_hash": hashlib.sha256(tensors).hexdigest(),  # by which A1111 names it in its pictures
        # ModelSpec 1.0.0, what it demands: https://github.com/Stability-AI/ModelSpec
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "Bestiary",
        "modelspec.resolution": f"{side}x{side}",
        KOHYA_CONFIG_KEY: _dump(config),
        PROVENANCE_KEY: _dump(adapter.provenance),
    }
    return save(weights, metadata)


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True)
