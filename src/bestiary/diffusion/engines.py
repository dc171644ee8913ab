"""Engines run the networks of a pipeline: torch, or OpenVINO with an exported folder.

`open_export` returns diffusers' pipeline with networks that OpenVINO runs, so everything that draws with a pipeline
can also draw with an export. OpenVINO compiles a network for the shapes that it is called with, because fixed shapes
take a third less time than dynamic ones. Compiled networks are cached for the next process, without their weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from platformdirs import user_cache_path

from bestiary.diffusion.base import device_and_dtype, quiet_loading
from bestiary.diffusion.export_format import (
    NETWORK_FILE,
    WEIGHTS_FILE,
    DamagedExportError,
    Manifest,
    Precision,
    UnusableExportError,
    check_files,
    read_manifest,
)
from bestiary.errors import BestiaryError
from bestiary.files import write_atomically
from bestiary.memory import keep_freed_memory

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

INSTALL = "pip install 'bestiary[openvino]'"
# Instructions that make a precision faster than float32, as Linux names them.
INSTRUCTIONS: Mapping[Precision, frozenset[str]] = {
    "int8": frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}),
    "bf16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
}
UNUSED_SECONDS = 30 * 24 * 60 * 60  # after which a compiled network is removed from the cache
BLOB = re.compile(r"[0-9a-f]{64}\.blob")  # the file name of a compiled network
MAX_COMPILED = 2  # shapes in memory per network: a guided step has twice the batch of one without guidance


@dataclass(frozen=True)
class Processor:
    """A processor: its name, and the instructions that it has; None if the system does not list them."""

    flags: frozenset[str] | None
    name: str = "unknown"

    @staticmethod
    def here() -> Processor:
        """This machine's processor."""
        lines: list[str] = []
        with suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        first = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
        flags = first.get("flags") or first.get("Features")
        return Processor(frozenset(flags.split()) if flags else None, first.get("model name", platform.machine()))

    def has(self, precision: Precision) -> bool:
        """Whether the processor has instructions for this precision. Every processor has float32."""
        return precision == "fp32" or self.flags is None or bool(INSTRUCTIONS[precision] & self.flags)

    def best(self) -> Precision:
        """The fastest precision that the processor has instructions for."""
        return next(precision for precision in ("int8", "bf16", "fp32") if self.has(precision))


def openvino() -> Any:
    """The openvino package. It sends no usage statistics unless the user sets DO_NOT_TRACK=false.

    Raises BestiaryError when it is not installed, and UnusableExportError when its installation is broken.
    """
    if find_spec("openvino") is None:
        raise BestiaryError(f"The engine openvino is not installed. Install it with `{INSTALL}`.")
    refuse_statistics()
    with _unusable("The installed OpenVINO cannot be imported.", f"Install it again with `{INSTALL}`."):
        import openvino
    return openvino


def openvino_core() -> Any:
    """OpenVINO's Core, which compiles networks. Raises what `openvino` does; UnusableExportError if it cannot start."""
    package = openvino()
    with _unusable("OpenVINO cannot be started.", f"Install it again with `{INSTALL}`."):
        return package.Core()


@contextmanager
def _unusable(problem: str, remedy: str) -> Iterator[None]:
    """Turn whatever OpenVINO raises in the body into an UnusableExportError."""
    try:
        yield
    except Exception as error:  # the type depends on OpenVINO's version, on numpy's and on the cause
        raise UnusableExportError(problem, remedy) from error


def refuse_statistics() -> None:
    """Keep OpenVINO's packages from importing the package that sends usage statistics. They work without it."""
    if os.environ.get("DO_NOT_TRACK", "").lower() not in ("", "0", "false"):
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # makes the import fail


def reason_against(manifest: Manifest | None) -> str | None:
    """Why the export is not faster on this machine, as a clause; None if it is. Without a manifest: any export."""
    if device_and_dtype()[0].type != "cpu":
        return "this machine has a GPU, which torch uses"
    return obstacle_here(manifest)


def obstacle_here(manifest: Manifest | None) -> str | None:
    """Why this machine cannot run the export, as a clause; None if it can. Without a manifest: any export."""
    if find_spec("openvino") is None:
        return f"the engine openvino is not installed (`{INSTALL}`)"
    if manifest and not Processor.here().has(manifest.precision):
        return f"this processor has no instructions for {manifest.precision}"
    return None


def check_processor(folder: Path, precision: Precision) -> None:
    """Raise BestiaryError when this processor has no instructions for the precision of an export."""
    if not Processor.here().has(precision):
        raise BestiaryError(
            f"The export in {folder} computes in {precision}, for which this processor has no instructions. Export the "
            "adapter with --fp32, or draw with --engine torch."
        )


def open_export(folder: Path) -> StableDiffusionPipeline:
    """A pipeline whose networks OpenVINO runs on the CPU. Its UNet contains the adapter and has no torch weights.

    The pipeline cannot start from an image, because an export has no encoder. Raises DamagedExportError when a file is
    missing, has changed or does not load, UnusableExportError when OpenVINO does not work, and another BestiaryError
    when it is not installed or the processor lacks the instructions. OpenVINO compiles the networks when they are first
    called, so the first picture may raise UnusableExportError, too.
    """
    manifest = read_manifest(folder)
    core = openvino_core()
    check_processor(folder, manifest.precision)
    check_files(folder, manifest)
    try:
        return _load(folder, manifest, core)
    except Exception as error:  # OpenVINO, diffusers and transformers raise different types
        raise DamagedExportError(f"The export in {folder} cannot be loaded.") from error


def _load(folder: Path, manifest: Manifest, core: Any) -> StableDiffusionPipeline:
    keep_freed_memory()
    with quiet_loading():
        from diffusers import DDPMScheduler, StableDiffusionPipeline

        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        pipeline = StableDiffusionPipeline(
            vae=_Decoder(_Network(core, folder / "vae_decoder", manifest)),
            text_encoder=_TextEncoder(_Network(core, folder / "text_encoder", manifest)),
            tokenizer=_tokenizer(folder / "tokenizer"),
            unet=_UNet(_Network(core, folder / "unet", manifest), manifest.side_step),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compiled_cache() -> Path:
    """The folder for compiled networks: below BESTIARY_CACHE, or below `bestiary` in the user's cache folder."""
    return Path(os.environ.get("BESTIARY_CACHE") or user_cache_path("bestiary")) / "compiled"


def remove_unused(cache: Path) -> None:
    """Delete the compiled networks that no process has used for 30 days, and no other file.

    Another process may delete them at the same time, or compile again what it finds deleted.
    """
    oldest = time.time() - UNUSED_SECONDS
    with suppress(OSError):
        for file in cache.iterdir():
            if not BLOB.fullmatch(file.name):
                continue
            with suppress(OSError):
                found = file.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_mtime < oldest:
                    file.unlink()


def is_exported(pipeline: StableDiffusionPipeline) -> bool:
    """Whether OpenVINO runs this pipeline's networks."""
    return isinstance(pipeline.unet, _UNet)


def _tokenizer(folder: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _hint(network: str, precision: Precision) -> str:
    """The precision in which OpenVINO computes a network's layers that are not int8.

    It is bfloat16 for the UNet if the processor supports it. Text encoder and decoder take little time, so they use
    float32.
    """
    return "bf16" if network == "unet" and precision != "fp32" and Processor.here().has("bf16") else "f32"


class _Network:
    """A network in OpenVINO's format, compiled for the shapes that it is called with."""

    def __init__(self, core: Any, folder: Path, manifest: Manifest) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        self.decoder = manifest.decoder
        self._core, self._folder = core, folder
        # A compiled network that is cached without its weights reads them from the export. OpenVINO's own cache would
        # hold a copy of them, and loading from it would map both copies into memory.
        self._options = {
            "INFERENCE_PRECISION_HINT": _hint(folder.name, manifest.precision),
            "PERFORMANCE_HINT": "LATENCY",
            "CACHE_MODE": "OPTIMIZE_SIZE",
        }
        self._content = [manifest.files.get(f"{folder.name}/{name}") for name in (NETWORK_FILE, WEIGHTS_FILE)]
        self._compiled: dict[tuple[torch.Size, ...], Any] = {}  # by input shapes, most recently used last

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The network's first output. Raises UnusableExportError when OpenVINO cannot compile or run the network."""
        shapes = tuple(each.shape for each in inputs)
        compiled = self._compiled.pop(shapes, None)
        if compiled is None:
            if len(self._compiled) == MAX_COMPILED:
                del self._compiled[next(iter(self._compiled))]  # frees its memory before the next one is compiled
            compiled = self._cached(shapes) or self._compile(shapes)
        self._compiled[shapes] = compiled
        arrays = [each.numpy() for each in inputs]
        with _unusable(f"OpenVINO failed to run {self._folder / NETWORK_FILE}.", "Draw with torch instead."):
            (first, *_) = compiled(arrays).values()
        return torch.from_numpy(first.copy())  # the next call overwrites the request's memory

    def _blob(self, shapes: Sequence[torch.Size]) -> Path | None:
        """Where the network compiled for these shapes is cached; None if the manifest does not cover its files.

        The file is named after a hash of everything that the compiled network depends on.
        """
        if None in self._content:
            return None
        from openvino import __version__

        key = json.dumps([self._content, shapes, self._options, __version__, Processor.here().name])
        return compiled_cache() / f"{hashlib.sha256(key.encode()).hexdigest()}.blob"

    def _cached(self, shapes: Sequence[torch.Size]) -> Any:
        """The network compiled for these shapes by an earlier process; None if none can be loaded."""
        blob = self._blob(shapes)
        options = {**self._options, "WEIGHTS_PATH": str(self._folder / WEIGHTS_FILE)}
        if blob is None:
            return None
        with suppress(OSError):  # another user's cache can be read
            os.utime(blob)  # keeps it from being removed as unused
        with suppress(Exception):  # OpenVINO rejects a damaged file, and one for other instructions
            return self._core.import_model(blob.read_bytes(), "CPU", options)
        return None

    def _compile(self, shapes: Sequence[torch.Size]) -> Any:
        file = self._folder / NETWORK_FILE
        with _unusable(f"The installed version of OpenVINO cannot compute {file}.", "Export the adapter again."):
            model = self._core.read_model(file)
            model.reshape({port.any_name: list(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
            compiled = self._core.compile_model(model, "CPU", self._options)
        if blob := self._blob(shapes):
            # If OpenVINO cannot export it, or the folder cannot be written, the next process compiles again.
            with suppress(Exception):
                write_atomically(blob, compiled.export_model().getvalue())
                remove_unused(blob.parent)
        return compiled


class _Module(torch.nn.Module):
    """The attributes that diffusers reads from a network: config, device and dtype."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, network: _Network) -> None:
        from diffusers.configuration_utils import FrozenDict

        super().__init__()
        self.network = network
        self.config = FrozenDict(network.config)


class _UNet(_Module):
    fused_adapter = True

    def __init__(self, network: _Network, side_step: int) -> None:
        super().__init__(network)
        self.side_step = side_step

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
        **_: object,
    ) -> tuple[torch.Tensor]:
        """The prediction (B, C, h, w) for noisy latents, one timestep for all of them, and text features (B, T, D)."""
        # OpenVINO's own pipelines pass integers, so the network takes integers. Rounding moves Euler's by less than 1.
        timesteps = torch.as_tensor(timestep).float().round().long().reshape(1)
        return (self.network(sample.float(), timesteps, encoder_hidden_states.float()),)


class _TextEncoder(_Module):
    def forward(self, input_ids: torch.Tensor, **_: object) -> Any:
        """The features (B, T, D) of token ids (B, T)."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=self.network(input_ids))


class _Decoder(_Module):
    """An autoencoder that has only a decoder."""

    def __init__(self, network: _Network) -> None:
        super().__init__(network)
        self.decoder = _Part(network)
        self.kind = network.decoder

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
        """The pixels (B, 3, H, W), from -1 to 1, of latents (B, C, h, w)."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=self.decoder(latents))


class _Part(_Module):
    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.network(latents.float())
