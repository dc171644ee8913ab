"""Convert adapters between formats: read those of diffusers, PEFT, kohya and the original system; write two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save

from bestiary.diffusion.adapter_format import (
    DOWN,
    FILE_NAME,
    KOHYA_CONFIG_KEY,
    PART_NAMES,
    AdapterContent,
    Part,
    spread,
    with_sorted_header,
)
from bestiary.diffusion.adapter_names import KOHYA_PREFIX, KOHYA_TEXT_PREFIX
from bestiary.diffusion.adapter_reading import ORIGINAL_ALPHA, read_adapter
from bestiary.diffusion.stored_adapter import adapter_file, target_file
from bestiary.errors import BestiaryError
from bestiary.files import check_not_overwritten, write_atomically

KOHYA_PREFIXES: dict[Part, str] = {"unet": KOHYA_PREFIX, "text_encoder": KOHYA_TEXT_PREFIX}
KOHYA_FIELDS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}  # the others are the same
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
    is known, its own rule is used. `tell` gets a sentence that says so, and one of what was read.
    Raises BestiaryError when the source is no adapter of the UNet and the text encoder, when its alpha is unknown, when
    the format cannot hold one of its kinds, or when another file would be overwritten.
    """
    file = target_file(target, FILE_NAME if to == "diffusers" else f"{source.stem}.safetensors")
    adapter = read(source, alpha)
    if adapter.alpha_rule and alpha is None:
        tell(f"The alpha {spread(adapter.alphas)} was assumed: {adapter.alpha_rule}. Give another with --alpha.")
    data = _diffusers(adapter, source) if to == "diffusers" else _kohya(adapter)
    check_not_overwritten(file, data)
    write_atomically(file, data)
    counts = [(len(adapter.modules(part)), PART_NAMES[part]) for part in adapter.parts]
    total = sum(count for count, _ in counts)
    by_part = ", ".join(f"{count} of the {part}" for count, part in counts)
    tell(f"Converted {total} of {total} modules: {by_part}.")
    return file


def read(path: Path, alpha: float | None = None) -> AdapterContent:
    """Read an adapter in any of the formats; `alpha` is for files that do not store their own.

    Raises BestiaryError when the file is not a complete adapter, its alpha is unknown, or stored and given.
    """
    return read_adapter(adapter_file(path), alpha=alpha, original_alpha=ORIGINAL_ALPHA)


def hashes_of_formats(adapter: AdapterContent) -> frozenset[str]:
    """The SHA-256 of the files that this project writes for an adapter in diffusers' and in kohya's format.

    Conversions are exact, so they are the same for every copy that this project converted.
    """
    files = [_kohya(adapter)] if adapter.changes else [_kohya(adapter), adapter.to_bytes()]
    return frozenset(hashlib.sha256(data).hexdigest() for data in files)


def _diffusers(adapter: AdapterContent, source: Path) -> bytes:
    if adapter.changes:
        (_, module), change = min(adapter.changes.items(), key=lambda item: item[0])
        raise BestiaryError(
            f"{source} holds a {change.kind}, for example of {module}, which diffusers' format cannot "
            "hold. Convert it with --to kohya."
        )
    return adapter.to_bytes()


def _kohya(adapter: AdapterContent) -> bytes:
    """The file in kohya's format, as LyCORIS extended it. It stores an alpha for each module."""
    weights: dict[str, torch.Tensor] = {}
    for part, prefix in KOHYA_PREFIXES.items():
        loras, config = adapter.lora(part)
        for key, value in loras.items():
            module, end = key.rsplit(".lora_", 1)
            name = prefix + module.replace(".", "_")
            if end == "magnitude_vector":
                shape = (-1, *(1 for _ in loras[f"{module}{DOWN}"].shape[1:]))
                weights[f"{name}.dora_scale"] = value.reshape(shape).contiguous()
                continue
            weights[f"{name}.{'lora_down' if end.startswith('A') else 'lora_up'}.weight"] = value.contiguous()
            assert config is not None
            # kohya's tools scale by alpha / rank, so rsLoRA's alpha / sqrt(rank) needs another alpha there.
            weights[f"{name}.alpha"] = torch.tensor(config.scale_of(module) * config.rank_of(module))
        for (of, module), change in adapter.changes.items():
            if of == part:
                name = prefix + module.replace(".", "_")
                weights |= {f"{name}.{KOHYA_FIELDS.get(key, key)}": value for key, value in change.tensors.items()}
                if change.alpha is not None:
                    weights[f"{name}.alpha"] = torch.tensor(change.alpha)
    return with_sorted_header(save(weights, _kohya_header(adapter, weights)))


def _kohya_header(adapter: AdapterContent, weights: dict[str, torch.Tensor]) -> dict[str, str]:
    data = save(weights)
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    side = adapter.provenance.resolution or DEFAULT_RESOLUTION
    ranks, alphas = set(adapter.ranks), {float(value) for key, value in weights.items() if key.endswith(".alpha")}
    config = adapter.config.stored() if adapter.weights else {}
    if adapter.text_config:
        config |= {"text_encoder": adapter.text_config.stored()}
    return {
        "format": "pt",
        "ss_network_module": "lycoris.kohya" if adapter.changes else "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",  # as kohya's tools write it
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
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
        KOHYA_CONFIG_KEY: json.dumps(config, sort_keys=True),
        **adapter.own_metadata,
    }
