"""A base in one .safetensors file, as A1111 and ComfyUI keep it: Stable Diffusion 1.x in the names of its first code.

The configs and the tokenizer are those of Stable Diffusion 1.5. They come with this package, so nothing is downloaded.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from bestiary.errors import BestiaryError, shown
from bestiary.files import is_file

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTokenizer

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
CONFIGS = Path(__file__).parent / "stable_diffusion_1"  # as in a base's folder, with the tokenizer's merges alone
# The names in a checkpoint begin with these, by the part of a base.
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.transformer.",),
}
TOKENS = 77  # that the text encoder reads


def is_single_file(model: str | Path) -> bool:
    """Whether a base is one file. Raises BestiaryError for a pickle, which could run any code."""
    if is_file(model) and str(model).lower().endswith(PICKLES):
        raise BestiaryError(
            f"The base {model} is a pickle, which can run any code when it is opened. Convert it to .safetensors as "
            "docs/drawing.md shows, and use that file."
        )
    return str(model).lower().endswith(SUFFIX) and is_file(model)


def read_part(file: Path, part: str, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a part (unet, vae or text_encoder) by the names of diffusers and transformers.

    Raises BestiaryError when the file is no checkpoint of Stable Diffusion 1.x.
    """
    from diffusers.loaders import single_file_utils as diffusers_names

    with _opened(file) as content:
        names = list(content.keys())
        _check_family(file, content, names)
        wanted = [name for name in names if name.startswith(PREFIXES[part])]
        weights = {name: content.get_tensor(name) for name in wanted}
    if part == "unet":
        converted = diffusers_names.convert_ldm_unet_checkpoint(weights, config)
    elif part == "vae":
        converted = diffusers_names.convert_ldm_vae_checkpoint(weights, config)
    else:
        named = diffusers_names.convert_ldm_clip_checkpoint(weights)
        converted = {name.removeprefix("text_model."): value for name, value in named.items()}
        converted.pop("embeddings.position_ids", None)  # 0 to 76, which newer versions do not store
    return dict(converted)


def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of Stable Diffusion 1.x, built from its merges as OpenAI's CLIP does it."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    text = gzip.decompress((CONFIGS / "tokenizer" / "merges.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.splitlines()]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=merges, model_max_length=TOKENS
    )


def _check_family(file: Path, content: Any, names: list[str]) -> None:  # safetensors' file is not typed
    """Raise BestiaryError when the file is something else than Stable Diffusion 1.x that draws from noise."""
    if any(name.startswith("conditioner.embedders.") for name in names):
        family = "SDXL"
    elif any(name.startswith("cond_stage_model.model.") for name in names):
        family = "Stable Diffusion 2.x"
    elif any(name.startswith(("text_encoders.", "double_blocks.", "joint_blocks.")) for name in names):
        family = "a diffusion transformer"
    else:
        family = None
    if family:
        raise BestiaryError(f"The base {file} is {family}. As a single file, only Stable Diffusion 1.x is supported.")
    missing = [part for part, prefixes in PREFIXES.items() if not any(name.startswith(prefixes) for name in names)]
    if missing:
        lora = " It is an adapter: use it with --adapter." if any("lora" in name for name in names) else ""
        raise BestiaryError(
            f"The base {file} is not a complete checkpoint of Stable Diffusion: it holds no "
            f"{' and no '.join(missing)}.{lora}"
        )
    first = "model.diffusion_model.input_blocks.0.0.weight"
    channels = content.get_slice(first).get_shape()[1] if first in names else 4
    if channels != 4:
        raise BestiaryError(
            f"The base {file} is for inpainting or editing ({channels} input channels), which is not supported. "
            "Use a text-to-image checkpoint."
        )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise BestiaryError(
            f"The base {file} is not a readable safetensors file ({shown(str(error), 200)}). Get another copy."
        ) from None
