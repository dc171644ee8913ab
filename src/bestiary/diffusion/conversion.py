"""Convert adapters between formats: read those of diffusers, PEFT, kohya and the original system; write two of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save

from bestiary.diffusion.adapter_format import (
    FILE_NAME,
    KOHYA_CONFIG_KEY,
    PROVENANCE_KEY,
    AdapterContent,
    with_sorted_header,
)
from bestiary.diffusion.adapter_reading import KOHYA_PREFIX, ORIGINAL_ALPHA, read_adapter
from bestiary.diffusion.stored_adapter import adapter_file
from bestiary.errors import BestiaryError
from bestiary.files import write_atomically

DEFAULT_RESOLUTION = 512  # what Stable Diffusion v1 was trained at


def convert(
    source: Path,
    target: Path,
    to: Literal["diffusers", "kohya"],
    alpha: float | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Path:
    """Write the adapter `source` in the format `to` and return the file.

    `target` is a .safetensors file or a folder. `alpha` is for files that do not store their own; where their producer
    is known, its own rule is used, and `tell` gets the sentence that says so.
    Raises BestiaryError when the source is not a LoRA of a UNet, when its alpha is unknown, or when it is a DoRA
    and the target is a kohya file, which cannot hold it exactly.
    """
    if target.suffix not in ("", ".safetensors"):
        raise BestiaryError(f"{target} is neither a folder nor a .safetensors file. Choose another name.")
    adapter = read(source, alpha)
    if adapter.alpha_rule and alpha is None:
        tell(f"The alpha {adapter.config.lora_alpha:g} was assumed: {adapter.alpha_rule}. Give another with --alpha.")
    if to == "diffusers":
        name, data = FILE_NAME, adapter.to_bytes()
    else:
        name, data = f"{source.stem}.safetensors", _kohya(adapter, source)
    file = target if target.suffix == ".safetensors" else target / name
    write_atomically(file, data)
    return file


def read(path: Path, alpha: float | None = None) -> AdapterContent:
    """Read an adapter in any of the formats; `alpha` is for files that do not store their own.

    Raises BestiaryError when the file is not a complete LoRA of a UNet, its alpha is unknown, or stored and given.
    """
    return read_adapter(adapter_file(path), alpha=alpha, original_alpha=ORIGINAL_ALPHA)


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
