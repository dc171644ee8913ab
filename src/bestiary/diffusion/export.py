"""Export a base with its adapter for OpenVINO: convert the networks, quantize the UNet, write the folder."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bestiary import __version__
from bestiary.diffusion.adapter import adapter_sha256, apply_adapter, read_provenance
from bestiary.diffusion.base import base_sha256, load_pipeline, quiet_loading
from bestiary.diffusion.decoders import load_tiny_decoder, without_tiny
from bestiary.diffusion.engines import INSTALL, Processor, openvino, openvino_core, refuse_statistics
from bestiary.diffusion.export_format import (
    MANIFEST,
    NETWORK_FILE,
    NETWORKS,
    Manifest,
    Precision,
    hash_files,
    is_export,
)
from bestiary.diffusion.sampling import base_side, generate, make_scheduler
from bestiary.errors import BestiaryError
from bestiary.files import check_writable, unwritable, write_atomically
from bestiary.samplers import Decoder, DrawingDefaults

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PACKAGES = ("openvino", "nncf", "openvino-tokenizers", "torch", "diffusers", "transformers")
# The dynamic axes of each network's inputs: B, T, h and w.
FREE_AXES = {
    "input_ids": (0, 1),
    "sample": (0, 2, 3),
    "timestep": (),
    "encoder_hidden_states": (0, 1),
    "latent_sample": (0, 2, 3),
}
# What an export's folder contains, by name without suffix.
CONTENT = {Path(MANIFEST).stem, "model_index", "scheduler", "tokenizer", *NETWORKS}
ELSEWHERE = "Choose another folder with --out."
# Layers of the UNet that are not quantized: they take almost no time, and leaving them out cut the error by a tenth.
EXACT = ("conv_in", "conv_out", "time_emb")
# The libraries of the classes that readers of this layout expect. A tiny decoder is listed as an AutoencoderKL.
CLASSES = {
    "scheduler": "diffusers",
    "text_encoder": "transformers",
    "tokenizer": "transformers",
    "unet": "diffusers",
    "vae": "diffusers",
}


@dataclass(frozen=True)
class TinyDecoder:
    """A tiny decoder: a folder or an id on the Hugging Face hub, and the hub's revision."""

    model: str
    revision: str | None = None


@dataclass(frozen=True)
class Fused:
    """The adapter to export with its name and weight, its base, and how to draw with it."""

    base: str
    base_revision: str | None
    base_name: str  # valid on other machines too
    adapter: Path
    adapter_name: str
    weight: float
    defaults: DrawingDefaults
    few_step: bool = False


@dataclass(frozen=True)
class Format:
    """The format of an export: the precision of the UNet, and the tiny decoder; None: the base's own decoder."""

    precision: Precision
    tiny_decoder: TinyDecoder | None = None


@dataclass(frozen=True)
class Calibration:
    """The pictures on which quantization measures the UNet's activations, drawn as the export will be used.

    One more picture, of the first prompt, is not used for calibration. It measures the error.
    """

    prompts: Sequence[str]
    seed: int = 0

    def shortest(self) -> Calibration:
        """A single picture: enough to measure an error."""
        return Calibration(self.prompts[:1], self.seed)


@dataclass(frozen=True)
class Exported:
    """A finished export: its manifest, its size, and the UNet's error.

    The error is that of the UNet's predictions against torch in float32, relative to their norm, on the inputs of one
    picture that was not used for calibration.
    """

    manifest: Manifest
    mib: float
    unet_error: float


Latents = tuple[NDArray[np.generic], ...]  # the UNet's inputs: (B, C, h, w), (1,), (B, T, D)


@dataclass(frozen=True)
class Sample:
    """A call of the UNet: its inputs and torch's output."""

    inputs: Latents
    output: torch.Tensor


def export(fused: Fused, form: Format, calibration: Calibration, out: Path) -> Exported:
    """Write the adapter, fused into its base, to the folder `out` for OpenVINO.

    An older export in `out` is replaced. Raises BestiaryError when OpenVINO or NNCF is not installed, `out` contains
    anything else or cannot be written, or the adapter or the tiny decoder does not fit the base. Then nothing is
    written.
    """
    out = out.resolve()
    check_target(out)
    ov, core = openvino(), openvino_core()
    if form.precision == "int8" and find_spec("nncf") is None:
        raise BestiaryError(f"Quantizing to int8 needs NNCF, which is not installed. Install it with `{INSTALL}`.")
    pipeline = load_pipeline(fused.base, fused.base_revision, device="cpu", dtype=torch.float32)
    apply_adapter(pipeline, fused.adapter, fused.weight)
    *calls, held_out = _watch(pipeline, fused, calibration if form.precision == "int8" else calibration.shortest())
    samples = [sample.inputs for call in calls for sample in call]
    merge_adapters(pipeline)
    vae = pipeline.vae
    if form.tiny_decoder:
        vae = load_tiny_decoder(form.tiny_decoder.model, form.tiny_decoder.revision, pipeline)
    with _replacing(out) as folder:
        _write_parts(pipeline, fused, folder)
        for name, module, config, example in _networks(pipeline, vae):
            model = _converted(ov, module, example)
            if name == "unet" and form.precision == "int8":
                model = _quantized(model, samples)
            (folder / name).mkdir(exist_ok=True)
            if name == "unet":
                unet_error = _error(core, model, held_out)
            ov.save_model(model, folder / name / NETWORK_FILE, compress_to_fp16=form.precision != "fp32")
            write_json(folder / name / "config.json", config)
        manifest = _manifest(fused, form, pipeline, hash_files(folder))
        write_json(folder / MANIFEST, manifest.model_dump())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Exported(manifest, size / 2**20, unet_error)


def check_target(out: Path) -> None:
    """Raise BestiaryError when `out` contains anything but an export, which would be lost, or cannot be a folder."""
    check_writable(out.absolute().parent)
    if not out.exists():
        return
    if not is_export(out) and not (out.is_dir() and not any(out.iterdir())):
        raise BestiaryError(f"{out} exists and is no export, so it is not overwritten. {ELSEWHERE}")
    if foreign := next((path.name for path in sorted(out.iterdir()) if path.stem not in CONTENT), None):
        raise BestiaryError(f"{out} contains {foreign}, which is not part of an export and would be lost. {ELSEWHERE}")


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A temporary folder, which takes the place of `out` at the end. Raises BestiaryError when the disk refuses."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
            folder = Path(temporary, "export")
            folder.mkdir()
            yield folder
            check_target(out)  # again: something may have been written there meanwhile
            if out.exists():
                out.rename(Path(temporary, "replaced"))  # removed with the temporary folder
            folder.rename(out)
    except OSError as error:
        raise unwritable(out, error) from error


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write an indented JSON file."""
    write_atomically(path, f"{json.dumps(content, indent=2, ensure_ascii=False)}\n".encode())


def merge_adapters(pipeline: StableDiffusionPipeline) -> None:
    """Add the applied LoRA to the weights of the layers that it changes, so that it takes no time. Cannot be undone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for network in (pipeline.unet, pipeline.text_encoder):
        for module in network.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()


@torch.no_grad()
def _watch(pipeline: StableDiffusionPipeline, fused: Fused, calibration: Calibration) -> list[list[Sample]]:
    """The UNet calls that draw each calibration picture, and those of one more picture at the end."""
    seen: list[Sample] = []

    def record(_module: object, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        sample, timestep = positional[:2]
        inputs = sample.numpy(), np.array([round(float(timestep))]), named["encoder_hidden_states"].numpy()
        seen.append(Sample(inputs, output[0]))

    hook = pipeline.unet.register_forward_hook(record, with_kwargs=True)
    try:
        sampling = without_tiny(fused.defaults.sampling)
        pictures = []
        for number, prompt in enumerate([*calibration.prompts, calibration.prompts[0]]):
            generate(pipeline, [prompt], [calibration.seed + number], sampling, batch_size=1)
            pictures.append(seen[:])
            seen.clear()
        return pictures
    finally:
        hook.remove()


def _error(core: Any, model: Any, samples: Sequence[Sample]) -> float:
    """The error of the model's outputs, relative to the norm of torch's."""
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.cat([torch.from_numpy(compiled(sample.inputs)[0].copy()).flatten() for sample in samples])
    true = torch.cat([sample.output.flatten() for sample in samples])
    return float((found - true).norm() / true.norm())


class _Text(torch.nn.Module):
    def __init__(self, text_encoder: torch.nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.text_encoder(input_ids)
        return {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}


class _Prediction(torch.nn.Module):
    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {"out_sample": self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]}


class _Pixels(torch.nn.Module):
    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: torch.Tensor) -> dict[str, torch.Tensor]:
        decode: Callable[..., tuple[torch.Tensor]] = self.vae.decode  # type: ignore[assignment]
        return {"sample": decode(latent_sample, return_dict=False)[0]}


Network = tuple[str, torch.nn.Module, dict[str, object], dict[str, torch.Tensor]]


def _networks(pipeline: StableDiffusionPipeline, vae: Any) -> Iterator[Network]:
    """Each network with the name of its folder: a module with named inputs, its config, and example inputs."""
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    tokens, side = pipeline.tokenizer.model_max_length, unet.config.sample_size
    text_config = json.loads(text_encoder.config.to_json_string())
    yield "text_encoder", _Text(text_encoder), text_config, {"input_ids": torch.ones(2, tokens, dtype=torch.long)}
    latents = torch.zeros(2, unet.config.in_channels, side, side)
    features = torch.zeros(2, tokens, unet.config.cross_attention_dim)
    example = {"sample": latents, "timestep": torch.tensor([500]), "encoder_hidden_states": features}
    yield "unet", _Prediction(unet), _config(unet), example
    yield "vae_decoder", _Pixels(vae), _config(vae), {"latent_sample": latents[:1]}


def _config(network: Any) -> dict[str, object]:
    """The network's config without the folder that it was loaded from, which differs between machines."""
    config: dict[str, object] = json.loads(network.to_json_string())
    return {key: value for key, value in config.items() if key != "_name_or_path"}


@torch.no_grad()
def _converted(ov: Any, module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> Any:
    with warnings.catch_warnings(), quiet_loading():
        warnings.simplefilter("ignore")  # the tracer warns about every shape check in diffusers
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        # Checking the trace with a second trace would take most of the time.
        traced = TorchScriptPythonDecoder(
            module.eval(), example_input=dict(example), trace_kwargs={"check_trace": False}
        )
        model = ov.convert_model(traced, example_input=dict(example))
    model.reshape(
        {
            name: [-1 if axis in FREE_AXES[name] else size for axis, size in enumerate(value.shape)]
            for name, value in example.items()
        }
    )
    return model


def _quantized(model: Any, samples: Sequence[Latents]) -> Any:
    """The model with int8 weights and activations, except where NNCF knows that a transformer needs more precision."""
    with quiet_nncf():
        import nncf

        return nncf.quantize(
            model,
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
            ignored_scope=nncf.IgnoredScope(patterns=[f".*{name}.*" for name in EXACT], validate=False),
            # Without bias correction, quantizing a UNet of Stable Diffusion's size takes two minutes on two cores.
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )


@contextmanager
def quiet_nncf() -> Iterator[None]:
    """Import and use NNCF without its log, its progress bars and its usage statistics."""
    import contextlib
    import io
    import logging

    refuse_statistics()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _write_parts(pipeline: StableDiffusionPipeline, fused: Fused, folder: Path) -> None:
    """Write everything but the networks."""
    sampling = fused.defaults.sampling
    with quiet_loading():
        scheduler = make_scheduler(sampling.sampler, pipeline.scheduler.config, sampling.steps)
    scheduler.save_pretrained(folder / "scheduler")
    _write_finite(folder / "scheduler" / "scheduler_config.json")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    _write_tokenizer(pipeline.tokenizer, folder / "tokenizer")
    names = {"scheduler": type(scheduler).__name__, "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
    names |= {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    index: dict[str, object] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": version("diffusers")}
    index |= {part: [library, names[part]] for part, library in CLASSES.items()}
    index |= {part: [None, None] for part in ("feature_extractor", "image_encoder", "safety_checker")}
    write_json(folder / "model_index.json", {**index, "requires_safety_checker": False})


def _write_finite(path: Path) -> None:
    """Remove infinite numbers from a scheduler's config. They are defaults, and other readers reject them as JSON."""
    config = json.loads(path.read_bytes())
    finite = {key: value for key, value in config.items() if not (isinstance(value, float) and math.isinf(value))}
    write_json(path, finite)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Also write the tokenizer as a network, which OpenVINO GenAI needs, if openvino-tokenizers is installed."""
    if find_spec("openvino_tokenizers") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from openvino_tokenizers import convert_tokenizer

        converted = convert_tokenizer(tokenizer, with_detokenizer=False)
    openvino().save_model(converted, folder / "openvino_tokenizer.xml")


def _manifest(fused: Fused, form: Format, pipeline: StableDiffusionPipeline, files: dict[str, str]) -> Manifest:
    decoder: Decoder = "tiny" if form.tiny_decoder else "full"
    # The adapter is fused at its weight, so the export is drawn with weight 1.
    sampling = replace(fused.defaults.sampling, adapter_weight=1.0, decoder=decoder)
    drawing = replace(fused.defaults, sampling=sampling)
    return Manifest(
        format=1,
        engine="openvino",
        precision=form.precision,
        decoder=decoder,
        base=fused.base_name,
        base_revision=fused.base_revision,
        base_sha256=base_sha256(fused.base, fused.base_revision),
        adapter=fused.adapter_name,
        adapter_sha256=adapter_sha256(fused.adapter),
        adapter_weight=fused.weight,
        distilled_from_sha256=_distilled_from(fused.adapter),
        few_step=fused.few_step,
        drawing=json.loads(drawing.to_json()),
        side=base_side(pipeline),
        # A converted UNet enlarges latents as often as it halves them, and cannot cut off what was rounded up.
        side_step=pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1),
        processor=Processor.here().name,
        versions={"bestiary": __version__, **{name: version(name) for name in PACKAGES if _is_installed(name)}},
        files=files,
    )


def _distilled_from(adapter: Path) -> str | None:
    """The SHA-256 of the adapter that a few-step adapter was distilled from, if its file says so."""
    found = (read_provenance(adapter).model_extra or {}).get("distilled_from")
    sha256 = found.get("adapter_sha256") if isinstance(found, dict) else None
    return sha256 if isinstance(sha256, str) else None


def _is_installed(package: str) -> bool:
    return find_spec(package.replace("-", "_")) is not None
