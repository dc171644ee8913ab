"""Typed parameters: `params.yaml` with its profile applied. Unknown keys are refused.

No parameter has a default here, because DVC only sees changes in params.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from bestiary.errors import BestiaryError, short
from bestiary.samplers import (
    MAX_ADAPTER_WEIGHT,
    MAX_GUIDANCE_SCALE,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    Decoder,
    DrawingDefaults,
    GuidanceInterval,
    SamplerName,
    Sampling,
    Timesteps,
)
from bestiary.yaml_file import read_yaml

Fraction = Field(ge=0.0, lt=1.0)
Positive = Field(gt=0)
# What a sampler can work with: a version whose evaluation was beyond these limits could not be used.
Steps = Annotated[int, Field(gt=0, le=MAX_STEPS)]
GuidanceScale = Annotated[float, Field(ge=1.0, le=MAX_GUIDANCE_SCALE)]
Value = TypeVar("Value")
Count = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Template = Annotated[str, Field(pattern=r"\{\}")]
Policy = Literal["off", "flag", "quarantine"]


def rising(levels: GuidanceInterval) -> GuidanceInterval:
    """Reject an interval that contains no noise level."""
    if levels[0] >= levels[1]:
        raise PydanticCustomError("rising", "the first noise level must be below the second")
    if levels[0] < 0:
        raise PydanticCustomError("rising", "noise levels are not negative")
    return levels


def _as_tuple(levels: object) -> object:
    return tuple(levels) if isinstance(levels, list) else levels


Interval = Annotated[GuidanceInterval, BeforeValidator(_as_tuple), AfterValidator(rising)]


def falling(timesteps: Timesteps) -> Timesteps:
    """Reject timesteps that do not decrease from pass to pass, or that no base has."""
    if any(early <= late for early, late in pairwise(timesteps)):
        raise PydanticCustomError("falling", "each timestep must be below the one before")
    if min(timesteps) < 0 or max(timesteps) >= MAX_STEPS:
        raise PydanticCustomError("falling", f"timesteps must be from 0 to {MAX_STEPS - 1}")
    return timesteps


def different(values: list[Value]) -> list[Value]:
    """Refuse a value given twice."""
    if len(set(values)) < len(values):
        raise PydanticCustomError("different", "each value must be listed once")
    return values


def addressable(name: str) -> str:
    """Refuse a registered model's name that `models:/name@alias` could not hold."""
    if not re.fullmatch(r"""[^/:@'"\s]([^/:@'"]*[^/:@'"\s])?""", name) or not name.isprintable():
        raise PydanticCustomError("addressable", "a name holds no /, : or @, no quotes, and no space at its ends")
    return name


def watched(folder: str) -> str:
    """Refuse a folder of images that DVC does not watch for changes."""
    parts = Path(folder).parts
    if not parts or ".." in parts or parts[0] not in ("data", "examples") or (parts[0] == "data" and len(parts) > 1):
        raise PydanticCustomError("watched", "the folder must be one that DVC watches: data, or a folder in examples")
    return folder


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    model: str = Field(min_length=1)  # a folder, or an id on the Hugging Face hub
    revision: str | None


class ScienceDB(Section):
    dataset_id: str = Field(min_length=1)
    version: str = Field(min_length=1)
    connections: int = Field(gt=0, le=16)
    retries: int = Field(ge=0)
    timeout_s: float = Positive  # without a byte
    allow_missing: float = Fraction  # share of the files


class Dataset(Section):
    source: Literal["folder", "sciencedb"]
    folder: Annotated[str, AfterValidator(watched)]  # of the class folders; subjects.yaml lies beside it
    sciencedb: ScienceDB | None  # what that source needs
    classes: list[Name] | None = Field(min_length=1)  # class folders to take; None takes all
    images_per_class: int | None = Field(gt=0)

    @model_validator(mode="after")
    def _source_is_described(self) -> Dataset:
        if self.source == "sciencedb" and self.sciencedb is None:
            raise ValueError("the source sciencedb needs the section dataset.sciencedb")
        return self


class Clean(Section):
    min_side: int = Positive
    max_aspect_ratio: float = Field(gt=1.0)
    near_duplicate_bits: int = Field(ge=0, le=16)
    blank: Policy
    blurred: Policy
    exposure: Policy  # very dark or very bright
    off_topic: Literal["off", "flag", "quarantine", "auto"]
    off_topic_threshold: float = Fraction
    caption_without_name: Literal["prepend", "keep", "refuse"]


class Split(Section):
    val_fraction: float = Field(gt=0.0, lt=1.0)


class Encode(Section):
    flip: bool
    augmented_variants: int = Field(ge=0)
    rotation_degrees: float = Field(ge=0, le=180)
    shift: float = Field(ge=0, le=0.5)
    zoom: float = Field(ge=0, lt=1)
    brightness: float = Field(ge=0, lt=1)
    aspect_ratio_buckets: bool
    shuffle_tags: bool
    keep_tags: int = Field(ge=0)  # the first tags, which are neither shuffled nor dropped
    tag_dropout: float = Fraction
    caption_variants: int = Positive  # of each caption with shuffled or dropped tags
    compile: bool  # torch.compile for the autoencoder
    resolution: int = Field(ge=MIN_SIDE, le=MAX_SIDE, multiple_of=8)
    batch_size: int = Positive


class Preservation(Section):
    """How training preserves the base's pictures. `samples` counts one optimizer step's, as `batch_size` does."""

    kind: Literal["none", "noised", "drawn", "both"]
    weight: float = Positive
    samples: int = Positive


class AdapterTraining(Section):
    """The settings that training and distillation share: what is trained, how fast, and what validations draw.

    `batch_size` counts the images of one optimizer step.
    """

    rank: int = Positive
    targets: list[Name] = Field(min_length=1)  # names of the UNet's modules
    max_grad_norm: float = Positive
    ema_decay: float = Fraction
    learning_rate_schedule: Literal["cosine", "linear", "constant"]
    gradient_checkpointing: bool
    checkpoint_seconds: float = Field(ge=0)  # the least time between two checkpoints
    steps: int = Positive
    batch_size: int = Positive
    learning_rate: float = Positive
    warmup_steps: int = Field(ge=0)
    validate_every: int = Positive  # steps
    sheet_animals: int = Positive  # classes that are drawn at a validation
    sheet_seeds: int = Positive  # pictures of each of them, for the CLIP score


class Train(AdapterTraining):
    """How to train. `batch_size` counts the images of one optimizer step, over all processes and accumulated parts."""

    alpha: float = Positive
    dropout: float = Fraction
    use_rslora: bool
    use_dora: bool
    caption_dropout: float = Fraction
    min_snr_gamma: float | None = Field(gt=0)
    huber_c: float | None = Field(gt=0)  # None: squared error
    noise_offset: float = Field(ge=0)
    preservation: Preservation
    timestep_sampling: Literal["uniform", "stratified", "importance"]
    weight_decay: float = Field(ge=0)
    accumulation: int = Positive
    low_memory: bool  # replaces four other settings: diffusion/low_memory.py
    compile: Literal[
        "auto", "always", "never"
    ]  # torch.compile; auto: on a GPU, when the run is long enough to repay it
    optimizer: Literal["adamw", "adamw8bit"]
    criterion: Literal["val_loss", "clip_score"]  # chooses the best step
    patience: int | None = Field(gt=0)  # validations without an improvement of min_delta after which training stops
    min_delta: float = Field(ge=0)
    sheet_steps: Steps
    sheet_guidance_scale: GuidanceScale
    keep_checkpoints: bool  # keep the adapter of every validation, for evaluate.sweep

    @model_validator(mode="after")
    def _compiles_only_with_memory(self) -> Train:
        if self.low_memory and self.compile == "always":
            raise ValueError("low_memory trains without torch.compile, but compile is always. Set compile to never")
        return self

    def sheet_sampling(self, side: int) -> Sampling:
        """How the pictures of a validation are drawn, at `side` pixels a side."""
        return Sampling(
            "dpmsolver++", steps=self.sheet_steps, guidance_scale=self.sheet_guidance_scale, width=side, height=side
        )


class FewStepModel(Section):
    """A few-step adapter that others distilled, whose name says LCM, TCD or Hyper-SD."""

    model: str = Field(min_length=1)  # a folder, a file, or an id on the Hugging Face hub
    revision: str | None
    file: str | None = Field(min_length=1)  # one of several in the repository or folder; None: the only one
    weight: float = Field(gt=0, le=MAX_ADAPTER_WEIGHT)  # of this adapter, when it is combined with the trained one


class Distill(AdapterTraining):
    """How to distil base and adapter into a few-step adapter."""

    from_: FewStepModel | None = Field(alias="from")  # None: distil one here
    timesteps: Annotated[Timesteps, BeforeValidator(_as_tuple), AfterValidator(falling)] = Field(min_length=1)
    path_end: int = Field(ge=0)  # timestep at which the teacher's path ends with its clean prediction
    teacher_steps: int = Field(ge=2, le=MAX_STEPS)  # of the teacher, if its path covered the whole schedule
    guidance_scale: GuidanceScale  # of the teacher
    guidance_interval: Interval | None  # None: every step is guided
    huber_c: float = Positive

    @model_validator(mode="after")
    def _draws_on_the_path(self) -> Distill:
        if min(self.timesteps) <= self.path_end:
            raise ValueError(f"the timesteps must be above path_end, which is {self.path_end}")
        return self

    def sampling(self) -> Sampling:
        """How to draw with the few-step adapter: predict the clean picture at each timestep, add noise in between."""
        return Sampling("lcm", steps=len(self.timesteps), guidance_scale=1.0, timesteps=self.timesteps)


class Sweep(Section):
    """The grid that a sweep tries, with separate seeds, before the evaluation runs at the best point."""

    # Of the adapter.
    scales: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1), AfterValidator(different)]
    guidance_scales: Annotated[list[GuidanceScale], Field(min_length=1), AfterValidator(different)]
    checkpoints: bool  # those that train.keep_checkpoints kept, too
    seeds: int = Positive  # pictures a class for each of them
    score: Literal["clip_score", "margin", "top1"]


class Proof(Section):
    """What else is drawn of each subject that has a class word, to prove that the adapter shows this individual."""

    contexts: Annotated[list[Template], Field(min_length=1), AfterValidator(different)]  # for prompt following
    unrelated: Annotated[list[Name], Field(min_length=1), AfterValidator(different)]  # prompts, for leakage
    seeds: int = Positive  # pictures of each of these prompts
    class_seeds: int = Field(ge=2)  # pictures of the class word
    image_judge: Model | None  # such as DINOv2, for everything but prompt following; None: the judge

    @model_validator(mode="after")
    def _enough_pictures(self) -> Proof:
        for name in ("contexts", "unrelated"):
            if len(getattr(self, name)) * self.seeds < 2:
                raise ValueError(f"{name} and seeds together make one picture, and a measurement needs at least two")
        return self


class Evaluate(Section):
    template: Template
    bootstrap_resamples: int = Positive
    seeds: int = Field(ge=2)  # pictures a class
    steps: Steps
    guidance_scale: GuidanceScale
    scheduler: SamplerName
    batch_size: int = Positive
    guidance_interval: Interval | None  # None: every step is guided
    classes: list[Name] | None = Field(min_length=1)  # class folders to draw; None draws all
    second_judge: Model | None
    proof: Proof | None  # None: only the scores that several classes have
    adapter_weight: float | None = Field(gt=0)  # multiplied into the evaluated and registered adapter; None: 1
    sweep: Sweep | None

    def sampling(self, side: int | None = None) -> Sampling:
        """How an evaluation draws, at `side` pixels a side (None: the base's own size)."""
        return Sampling(
            sampler=self.scheduler,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            width=side,
            height=side,
        )

    def defaults(self) -> DrawingDefaults:
        """How to draw what no registered version describes: as this project evaluates."""
        return DrawingDefaults(self.template, self.sampling())


class Benchmark(Section):
    schedulers: list[SamplerName] = Field(min_length=1)
    steps: list[Steps] = Field(min_length=1)
    batch_sizes: list[Count] = Field(min_length=1)
    repeats: int = Field(ge=5)  # fewer have no 95th percentile
    pictures: int = Positive  # by which a setting's quality is judged
    # Beside all combinations of the above, the default setting with one thing changed:
    guidance: list[Literal["always", "interval", "never"]]
    guidance_interval: Interval
    dtypes: list[Literal["float32", "bfloat16", "float16"]]
    compile: list[bool]


class Export(Section):
    """How to export the few-step adapter for OpenVINO."""

    precision: Literal["int8", "bf16", "fp32"]  # of the UNet
    decoder: Decoder
    calibration_pictures: int = Positive  # drawn to measure the UNet's activations for int8


class Losses(Section):
    """How much worse than the default way the fast variant may be, by the worse end of the 95 % interval."""

    clip_score: float = Field(ge=0)
    margin: float = Field(ge=0)
    top1: float = Field(ge=0)  # percentage points
    cmmd: float = Field(ge=0)
    likeness: float = Field(ge=0)  # for one subject, instead of the four above: 0 as other individuals, 1 as its photos


class Accept(Section):
    """What the fast variant must prove before it is stored with the registered version."""

    max_loss: Losses
    min_diversity: float = Field(ge=0, le=1)  # share of the reference's diversity
    max_copied: float = Field(ge=0, le=1)  # share of pictures that look copied from training images
    reference_steps: Steps  # of DDPM, guided at every step
    timed_pictures: int = Positive  # drawn to measure the seconds of one picture
    extra_seeds: int = Field(ge=0)  # more pictures of each class than evaluate draws
    reference_seeds: int = Field(ge=2)  # pictures of each class that the reference draws, which is slow


class Register(Section):
    name: Annotated[str, AfterValidator(addressable)]
    champion_score: Literal["clip_score", "margin", "top1"]  # for several classes
    max_copied: float = Field(ge=0.0, le=1.0)
    # For one subject:
    max_prompt_loss: float = Field(ge=0)  # points of CLIP score
    max_leakage: float = Field(ge=0, le=200)  # 100 x (1 - cosine)


class Params(Section):
    profile: str
    recipe: str
    seed: int = Field(ge=0)
    base: Model
    judge: Model
    captioner: Model | None  # writes captions on request
    tiny_decoder: Model | None  # a small decoder, distilled from the base's own
    dataset: Dataset
    clean: Clean
    split: Split
    encode: Encode
    train: Train
    distill: Distill
    evaluate: Evaluate
    benchmark: Benchmark
    export: Export
    accept: Accept
    register_: Register = Field(alias="register")


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read `path`, merge its shared keys, its profile and its recipe, and validate every key.

    A value in the shared part overrides the profile's: `dvc exp run -S train.steps=60` writes it there. Raises
    BestiaryError that names the key when the file is missing, is no YAML, names an unknown profile or recipe, or holds
    an unknown key or a value of the wrong type.
    """
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise BestiaryError(f"{path} does not exist: run this in the project's folder.") from None
    if not isinstance(raw, dict):
        raise BestiaryError(f"{path} holds no parameters.")
    shared = dict(raw)
    profile, profile_settings = _chosen(shared, "profile", path)
    recipe, recipe_settings = _chosen(shared, "recipe", path)
    merged = _merge(shared, profile_settings, f"{path}: profiles.{profile}")
    for name, section in recipe_settings.items():  # a recipe overrides what is there
        where = f"recipes.{recipe}.{_line(name)}"
        if not isinstance(section, Mapping) or not isinstance(merged.get(name, {}), Mapping):
            raise BestiaryError(f"{path}: {where} must be a table of keys.")
        for key in section:
            if _is_override(key, shared.get(name), profile_settings.get(name)):
                raise BestiaryError(f"{path}: {name}.{_line(key)} has no effect: {where} sets it. Change it there.")
        merged[name] = {**merged.get(name, {}), **section}
    try:
        return Params.model_validate(merged)
    except ValidationError as error:
        # A misspelt key is missing, too, under its right name.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        key = _line(".".join(str(part) for part in first["loc"]))
        raise BestiaryError(f"{path}: {key} (profile {profile}): {_explain(first)}.") from None


def _chosen(shared: dict[str, Any], kind: Literal["profile", "recipe"], path: Path) -> tuple[str, Mapping[str, Any]]:
    """The name of the profile or recipe that the file chooses, and its settings, which are taken out of `shared`."""
    offered = shared.pop(f"{kind}s", None) or {}
    name = shared.get(kind)
    if not isinstance(offered, Mapping):
        raise BestiaryError(f"{path}: {kind}s must be a table of {kind}s.")
    if not isinstance(name, str) or name not in offered:
        names = _line(", ".join(map(str, offered)))
        raise BestiaryError(f"{path}: there is no {kind} {short(name)}; choose one of {names}.")
    settings = offered[name] or {}
    if not isinstance(settings, Mapping):
        raise BestiaryError(f"{path}: {kind}s.{_line(name)} must be a table of keys.")
    return _line(name), settings


def _is_override(key: object, shared: object, profile: object) -> bool:
    """Whether the shared part overrides a key of the profile."""
    both = isinstance(shared, Mapping) and isinstance(profile, Mapping) and key in profile
    return both and isinstance(shared, Mapping) and shared.get(key) is not None


def _merge(shared: Mapping[str, Any], profile: Any, where: str) -> dict[str, Any]:
    """The shared settings with those of the profile in the empty places."""
    if not isinstance(profile, Mapping):
        raise BestiaryError(f"{where} must be a table of keys.")
    merged = dict(shared)
    for key, value in profile.items():
        if merged.get(key) is None:
            merged[key] = value
        elif value is not None and isinstance(merged[key], Mapping):
            merged[key] = _merge(merged[key], value, f"{where}.{_line(key)}")
    return merged


def _line(text: object) -> str:
    """At most a line of a key."""
    line = " ".join(str(text).split())
    return line if len(line) <= 100 else f"{line[:99]}…"


def _explain(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return "this key is unknown. Check its spelling, or remove it"
    if problem["type"] == "missing":
        return "this key is missing"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{problem['msg'][0].lower()}{problem['msg'][1:]}, not {short(problem['input'])}"
