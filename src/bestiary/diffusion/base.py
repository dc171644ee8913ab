"""The base: load Stable Diffusion's parts from a folder or the Hugging Face hub, on the best device and dtype.

Shapes in this package: B batch, C latent channels, H, W pixels, h, w latents, T tokens, D text features.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from bestiary.diffusion.single_file import CONFIGS, clip_tokenizer, is_single_file, read_part
from bestiary.errors import BestiaryError, shown
from bestiary.files import is_folder
from bestiary.hub import HubModel, download, is_hub_id
from bestiary.memory import keep_freed_memory

if TYPE_CHECKING:
    from accelerate import PartialState
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

T = TypeVar("T")
# The files of a base that this project reads and that its hash covers: no README, no weights in another precision.
FILES = (
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/*",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
# What the libraries' loaders would read beside these files: an index of other weights, an adapter, code, or a config.
# Files of another precision have its name in theirs and are never loaded.
PARTS = ("scheduler", "text_encoder", "unet", "vae")
LOADED_UNASKED = re.compile(r"(?!.*\.(?:fp16|bf16|fp32|ema|non_ema)\.).*\.(?:json|py)")


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """The best device of this machine and the dtype that it computes fastest in without losing quality.

    A GPU computes in bfloat16 if its hardware can, otherwise in float16. A CPU computes in float32, because a CPU
    without AMX is fifty times slower in bfloat16. Raises what `is_cpu_forced` does.
    """
    if is_cpu_forced():
        return torch.device("cpu"), torch.float32
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device("cuda"), torch.bfloat16 if native else torch.float16
    if torch.backends.mps.is_available():
        return torch.device("mps"), torch.float32
    return torch.device("cpu"), torch.float32


def is_cpu_forced() -> bool:
    """Whether ACCELERATE_USE_CPU says to leave a GPU alone, as `accelerate launch --cpu` sets it.

    Raises BestiaryError when it is neither true nor false.
    """
    if "ACCELERATE_USE_CPU" not in os.environ:
        return False
    from accelerate.utils import parse_flag_from_env

    try:
        return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))
    except ValueError:
        raise BestiaryError("ACCELERATE_USE_CPU is neither true nor false. Set it to one of them.") from None


def processes() -> PartialState:
    """The state of this process among those of `accelerate launch` or torchrun.

    The first call gives each process its GPU, or connects processes on CPUs over gloo.
    """
    from accelerate import PartialState

    keep_freed_memory()
    return PartialState(cpu=device_and_dtype()[0].type == "cpu")


def base_folder(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of a base: `model` itself, or the hub's snapshot of it, downloaded on first use.

    Of a base in a single file, it is the folder with its configs.
    Raises BestiaryError when there is no such folder and the hub does not have it or cannot be reached, and when the
    folder has a file that a loader would read although `base_sha256` does not cover it.
    """
    folder = Path(model)
    if is_single_file(model):
        return CONFIGS
    if not is_folder(folder):
        folder = _download(str(model), revision)
    _check_files(folder, model)
    return folder


def _download(model: str, revision: str | None) -> Path:
    if not is_hub_id(model):
        raise BestiaryError(
            f"The base {shown(model, 200)} does not exist. Give a folder, or an owner/name on the Hugging Face hub."
        )
    return download(on_hub(model, revision))


def on_hub(model: str, revision: str | None) -> HubModel:
    """The files of a base on the hub."""
    return HubModel("base", model, revision, FILES, weights=(), key="base")


def _check_files(folder: Path, model: str | Path) -> None:
    """Raise BestiaryError when loading the base would read a file that its hash does not cover."""
    for part in PARTS:
        for path in sorted((folder / part).glob("*")):
            name = path.relative_to(folder).as_posix()
            if name not in FILES and LOADED_UNASKED.fullmatch(path.name):
                raise BestiaryError(
                    f"The base {model} has the file {name}, which would change what it draws and is not covered by its "
                    "SHA-256. Remove the file, or get another copy of the base."
                )
        config = folder / part / "config.json"
        if config.is_file() and b'"transformers_weights"' in config.read_bytes():
            raise BestiaryError(
                f"The base {model} names other weights in {part}/config.json (transformers_weights). "
                "Get another copy of the base."
            )


def base_sha256(model: str | Path, revision: str | None = None) -> str:
    """SHA-256 of the names and contents of the base's files that this project reads; of a single file, its own."""
    if is_single_file(model):
        with Path(model).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    folder = base_folder(model, revision)
    digest = hashlib.sha256()
    for path in sorted(path for pattern in FILES for path in folder.glob(pattern) if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def base_commit(model: str | Path, revision: str | None = None) -> str | None:
    """The commit on the Hugging Face hub that a base was downloaded from; None for a folder or a file."""
    folder = base_folder(model, revision)
    return None if Path(model).exists() else folder.name


def size_factors(model: str | Path, revision: str | None = None) -> tuple[int, int]:
    """The factors that a picture's sides must be multiples of: for the autoencoder alone, and for the UNet too."""

    def halvings(part: str) -> int:
        config = _load(lambda folder: json.loads((folder / "config.json").read_text()), part, model, revision)
        return len(config["block_out_channels"]) - 1

    vae = 2 ** halvings("vae")
    return vae, vae * 2 ** halvings("unet")


def load_unet(
    model: str | Path, revision: str | None = None, *, dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """The base's UNet, frozen, in evaluation mode, on the CPU."""
    from diffusers import UNet2DConditionModel

    return _load_weights(UNet2DConditionModel, "unet", model, revision, dtype)


def load_vae(model: str | Path, revision: str | None = None, *, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The base's autoencoder, frozen, in evaluation mode, on the CPU."""
    from diffusers import AutoencoderKL

    return _load_weights(AutoencoderKL, "vae", model, revision, dtype)


def load_text(
    model: str | Path, revision: str | None = None, *, dtype: torch.dtype = torch.float32
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The base's tokenizer and its text encoder, frozen, in evaluation mode, on the CPU."""
    from transformers import CLIPTextModel, CLIPTokenizer

    def load(folder: Path) -> CLIPTokenizer:
        return clip_tokenizer() if is_single_file(model) else CLIPTokenizer.from_pretrained(folder)

    tokenizer = _load(load, "tokenizer", model, revision)
    return tokenizer, _load_weights(CLIPTextModel, "text_encoder", model, revision, dtype)


def load_scheduler(model: str | Path, revision: str | None = None) -> DDPMScheduler:
    """The base's noise schedule and prediction type as a DDPM scheduler, whose process training follows."""
    from diffusers import DDPMScheduler

    return _load(lambda folder: DDPMScheduler.from_pretrained(folder), "scheduler", model, revision)


def load_pipeline(
    model: str | Path,
    revision: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> StableDiffusionPipeline:
    """The complete base as a pipeline, by default on the best device and in its dtype.

    Raises BestiaryError when a part is missing or broken.
    """
    with quiet_loading():
        from diffusers import StableDiffusionPipeline

    keep_freed_memory()
    best_device, best_dtype = device_and_dtype()
    device = torch.device(device or best_device)
    dtype = dtype or (best_dtype if device.type == best_device.type else torch.float32)
    tokenizer, text_encoder = load_text(model, revision, dtype=dtype)
    parts = {
        "vae": load_vae(model, revision, dtype=dtype),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": load_unet(model, revision, dtype=dtype),
        "scheduler": load_scheduler(model, revision),
    }
    with quiet_loading():
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@torch.inference_mode()
def encode_text(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: Sequence[str]) -> torch.Tensor:
    """The text encoder's features of each text: (B, T, D), on the encoder's device.

    Raises BestiaryError when a text has more than the encoder's T tokens, because its end would be ignored.
    """
    longest = tokenizer.model_max_length
    for text, ids in zip(texts, tokenizer(list(texts)).input_ids, strict=True):
        if len(ids) > longest:
            raise too_long_error(text, len(ids), longest)
    ids = tokenizer(
        list(texts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
    ).input_ids
    features: torch.Tensor = text_encoder(ids.to(text_encoder.device)).last_hidden_state  # (B, T, D)
    return features


def too_long_error(text: str, tokens: int, limit: int) -> BestiaryError:
    """The error for a text with more tokens than can be encoded."""
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    return BestiaryError(f"This text has {tokens} tokens and the base reads {limit}: {shown!r}. Shorten it.")


def _load_weights(kind: Any, part: str, model: str | Path, revision: str | None, dtype: torch.dtype) -> Any:
    def load(folder: Path) -> Any:
        if is_single_file(model):
            return _load_from_file(kind, part, Path(model), folder, dtype)
        loaded, report = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, dtype=dtype)
        # The loader only warns of weights that are missing from the file, and leaves them random.
        if report["missing_keys"]:
            raise ValueError(f"{len(report['missing_keys'])} weights are not in the file")
        return loaded.eval().requires_grad_(False)

    return _load(load, part, model, revision)


def _load_from_file(kind: Any, part: str, file: Path, configs: Path, dtype: torch.dtype) -> Any:
    """A part of a base in a single file. Raises what PyTorch raises when weights are missing or have other shapes."""
    from accelerate import init_empty_weights

    # diffusers' models are made from a config as a dictionary, those of transformers from an object.
    config = kind.load_config(configs) if part != "text_encoder" else kind.config_class.from_pretrained(configs)
    with init_empty_weights(include_buffers=False):  # random weights of this size take seconds
        loaded = kind.from_config(config) if part != "text_encoder" else kind(config)
    weights = read_part(file, part, config if part != "text_encoder" else {})
    loaded.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    return loaded.to(dtype).eval().requires_grad_(False)


def _load(load: Callable[[Path], T], part: str, model: str | Path, revision: str | None) -> T:
    folder = base_folder(model, revision) / part
    if not folder.is_dir():
        raise BestiaryError(f"The base {model} is incomplete: it has no {part}. Get another copy of it.")
    try:
        with quiet_loading():
            return load(folder)
    except BestiaryError:
        raise
    except Exception as error:  # the loaders raise anything: OSError, ValueError, KeyError, SafetensorError, ...
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BestiaryError(
            f"The base {model} is broken: its {part} does not load ({lines[0].rstrip('.')}). Get another copy of it."
        ) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the progress bars and warnings of diffusers and transformers. Whatever is wrong is raised.

    A library that the program has not imported stays so.
    """
    modules = (sys.modules.get(f"{library}.utils.logging") for library in ("diffusers", "transformers"))
    libraries = [module for module in modules if module is not None]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
