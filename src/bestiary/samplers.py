"""Samplers by the names that A1111 and ComfyUI use, and `Sampling`: how a picture is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SamplerName = Literal[
    "ddpm",
    "ddim",
    "dpmsolver++",
    "dpmsolver++karras",
    "dpmsolver++sde",
    "unipc",
    "euler",
    "euler-ancestral",
    "lcm",
    "ddim-trailing",
    "tcd",
]
Decoder = Literal["full", "tiny"]  # full: the base's own; tiny: a small one that was distilled from it
# Noise levels (low, high]: only the steps inside are guided (arXiv:2404.07724).
GuidanceInterval = tuple[float, float]
Timesteps = tuple[int, ...]
MAX_STEPS, MIN_SIDE, MAX_SIDE, SIDE_STEP, MAX_GUIDANCE_SCALE, MAX_ADAPTER_WEIGHT = 1000, 8, 4096, 8, 50, 2
MAX_ADAPTERS = 8  # at once
DEFAULT_DENOISE = 0.5


@dataclass(frozen=True)
class Sampler:
    """A sampler: its label in other programs, and the diffusers class and options behind it.

    `stochastic` samplers add noise at every step, so more steps give a different image instead of converging. `eta` is
    how much of it they add, where that is a setting: from 0 to 1.
    """

    label: str
    scheduler: str
    options: Mapping[str, str | int | bool]
    stochastic: bool = False
    eta: float = 0.0


def _dpmsolver(
    algorithm: str, *, karras: bool = False, order: int = 2, spacing: str = "linspace"
) -> dict[str, str | int | bool]:
    return {
        "algorithm_type": algorithm,
        "use_karras_sigmas": karras,
        "solver_order": order,
        "timestep_spacing": spacing,
    }


# clip_sample is off because latents are not limited to [-1, 1]. timestep_spacing is "linspace" because with "leading",
# which many bases set, diffusers starts 400 steps at timestep 800 although the latents are still pure noise.
# DDIM is first-order DPM-Solver++ (arXiv:2211.01095, section 4): diffusers' own DDIM misses the next timestep when
# 1000 is not a multiple of the number of steps.
# Each entry sets every option that any other entry overrides, because schedulers are built from one another's config.
# Sources, in order: arXiv:2006.11239, 2010.02502, 2211.01095 for three (with the noise levels of 2206.00364 where the
# name says Karras), 2302.04867, 2206.00364, k-diffusion's sample_euler_ancestral, 2310.04378.
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler("DDPM", "DDPMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}, stochastic=True),
    "ddim": Sampler("DDIM", "DPMSolverMultistepScheduler", _dpmsolver("dpmsolver++", order=1)),
    "dpmsolver++": Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", _dpmsolver("dpmsolver++")),
    "dpmsolver++karras": Sampler(
        "DPM++ 2M Karras", "DPMSolverMultistepScheduler", _dpmsolver("dpmsolver++", karras=True)
    ),
    "dpmsolver++sde": Sampler(
        "DPM++ 2M SDE Karras",
        "DPMSolverMultistepScheduler",
        _dpmsolver("sde-dpmsolver++", karras=True),
        stochastic=True,
    ),
    "unipc": Sampler(
        "UniPC",
        "UniPCMultistepScheduler",
        {"use_karras_sigmas": False, "solver_order": 2, "timestep_spacing": "linspace"},
    ),
    "euler": Sampler("Euler", "EulerDiscreteScheduler", {"use_karras_sigmas": False, "timestep_spacing": "linspace"}),
    "euler-ancestral": Sampler(
        "Euler a", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "linspace"}, stochastic=True
    ),
    "lcm": Sampler("LCM", "LCMScheduler", {"clip_sample": False, "timestep_spacing": "leading"}, stochastic=True),
    # The ends of equal parts of the noise schedule, at which Hyper-SD was distilled (arXiv:2404.13686).
    "ddim-trailing": Sampler(
        "DDIM SGM Uniform", "DPMSolverMultistepScheduler", _dpmsolver("dpmsolver++", order=1, spacing="trailing")
    ),
    # arXiv:2402.19159, whose authors advise 0.3 for eta, their gamma.
    "tcd": Sampler("TCD", "TCDScheduler", {"timestep_spacing": "leading"}, stochastic=True, eta=0.3),
}
assert tuple(SAMPLERS) == get_args(SamplerName)


@dataclass(frozen=True)
class Sampling:
    """How to draw a picture: everything that decides its pixels besides prompt, seed, base and adapter.

    width and height are in pixels (None: the size that the base was trained at). guidance_interval None guides every
    step. adapter_weight is the factor that the adapter is applied with: 1.0 as trained. Guidance leads away from the
    negative_prompt. timesteps are those that a few-step adapter was distilled for, one for each step, in falling order;
    None: as the sampler spaces them.
    """

    sampler: str = "dpmsolver++"
    steps: int = 25
    guidance_scale: float = 7.5
    guidance_interval: GuidanceInterval | None = None
    width: int | None = None
    height: int | None = None
    adapter_weight: float = 1.0
    negative_prompt: str = ""
    timesteps: Timesteps | None = None
    decoder: Decoder = "full"

    @property
    def is_possible(self) -> bool:
        """Whether every value is in the range that a sampler can work with.

        >>> Sampling("ddim", steps=10).is_possible, Sampling("ddim", steps=0).is_possible
        (True, False)
        """
        low, high = self.guidance_interval or (0.0, 1.0)
        return (
            self.sampler in SAMPLERS
            and 1 <= self.steps <= MAX_STEPS
            and 1 <= self.guidance_scale <= MAX_GUIDANCE_SCALE
            and 0 <= low < high < math.inf
            and all(side is None or MIN_SIDE <= side <= MAX_SIDE for side in (self.width, self.height))
            and 0 <= self.adapter_weight < math.inf
            and (self.timesteps is None or _fit(self.timesteps, self.steps))
        )

    def in_steps_of(self, other: Sampling) -> Sampling:
        """This sampling with the other's sampler, steps, timesteps and guidance.

        >>> Sampling("ddim", steps=10, width=64).in_steps_of(Sampling("lcm", 2, 1.0, timesteps=(999, 499))).steps
        2
        """
        return replace(
            self,
            sampler=other.sampler,
            steps=other.steps,
            guidance_scale=other.guidance_scale,
            guidance_interval=other.guidance_interval,
            timesteps=other.timesteps,
        )


def _fit(timesteps: Timesteps, steps: int) -> bool:
    """Whether there is one timestep for each step, and each is below the one before."""
    falls = all(early > late for early, late in pairwise(timesteps))
    return len(timesteps) == steps and falls and min(timesteps) >= 0 and max(timesteps) < MAX_STEPS


def denoising_steps(steps: int, denoise: float) -> int:
    """How many of the steps are drawn when a picture starts from an image, and not from noise.

    >>> denoising_steps(25, 0.5), denoising_steps(10, 0.7), denoising_steps(4, 0.1)
    (12, 7, 1)
    """
    return max(1, math.floor(steps * denoise + 1e-9))  # 10 * 0.7 is 6.999...


@dataclass(frozen=True)
class SamplingChanges:
    """What a request changes of the default sampling; None leaves a value as it is."""

    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: GuidanceInterval | None = None
    width: int | None = None
    height: int | None = None
    negative_prompt: str | None = None
    adapter_weight: float | None = None
    decoder: Decoder | None = None

    def apply(self, sampling: Sampling) -> Sampling:
        """The sampling with these changes.

        >>> SamplingChanges(steps=4).apply(Sampling("ddim", steps=10)).steps
        4
        """
        given = {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}
        return replace(sampling, **given)


@dataclass(frozen=True)
class StoredSampling:
    """`Sampling` as PNG metadata, registry tags and the page hold it.

    Square pictures have one `resolution`, as in files written before there were others. Values that were not stored
    then have defaults here.
    """

    steps: int
    guidance_scale: float
    scheduler: str
    resolution: int | None
    guidance_interval: GuidanceInterval | None = None
    width: int | None = None
    height: int | None = None
    adapter_weight: float = 1.0
    negative_prompt: str = ""
    timesteps: Timesteps | None = None
    decoder: Decoder = "full"


# Stored only if they differ from their defaults.
OPTIONAL = ("width", "height", "adapter_weight", "negative_prompt", "timesteps", "decoder")


def to_stored(sampling: Sampling) -> dict[str, object]:
    """The fields of `StoredSampling`, ready for JSON.

    >>> to_stored(Sampling("ddim", steps=10, guidance_scale=3.0, width=64, height=64))
    {'steps': 10, 'guidance_scale': 3.0, 'scheduler': 'ddim', 'resolution': 64, 'guidance_interval': None}
    """
    square = sampling.width == sampling.height
    stored = StoredSampling(
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        scheduler=sampling.sampler,
        resolution=sampling.width if square else None,
        guidance_interval=sampling.guidance_interval,
        width=None if square else sampling.width,
        height=None if square else sampling.height,
        adapter_weight=sampling.adapter_weight,
        negative_prompt=sampling.negative_prompt,
        timesteps=sampling.timesteps,
        decoder=sampling.decoder,
    )
    return {
        each.name: getattr(stored, each.name)
        for each in fields(stored)
        if each.name not in OPTIONAL or getattr(stored, each.name) != each.default
    }


def from_stored(stored: StoredSampling) -> Sampling:
    """The `Sampling` that `to_stored` was given."""
    return Sampling(
        sampler=stored.scheduler,
        steps=stored.steps,
        guidance_scale=stored.guidance_scale,
        guidance_interval=stored.guidance_interval,
        width=stored.resolution or stored.width,
        height=stored.resolution or stored.height,
        adapter_weight=stored.adapter_weight,
        negative_prompt=stored.negative_prompt,
        timesteps=stored.timesteps,
        decoder=stored.decoder,
    )


def sampling_to_json(sampling: Sampling) -> str:
    """The sampling as JSON, for `sampling_from_json`."""
    return json.dumps(to_stored(sampling), sort_keys=True)


def sampling_from_json(text: str) -> Sampling:
    """Parse the output of `sampling_to_json`. Raises ValueError for anything else."""
    sampling = from_stored(_stored_sampling().validate_json(text, strict=True))
    if not sampling.is_possible:
        raise ValueError(text)
    return sampling


@cache
def _stored_sampling() -> TypeAdapter[StoredSampling]:
    from pydantic import TypeAdapter

    return TypeAdapter(StoredSampling)


@dataclass(frozen=True)
class DrawingDefaults:
    """How pictures are drawn unless the user asks otherwise: for a registered adapter, as it was evaluated."""

    template: str = "a photo of {}"
    sampling: Sampling = field(default_factory=Sampling)

    def to_dict(self) -> dict[str, object]:
        """The template and the sampling in one flat table, ready for JSON."""
        return {"template": self.template, **to_stored(self.sampling)}

    def to_json(self) -> str:
        """This as JSON, for `from_json`."""
        return json.dumps(self.to_dict())

    @staticmethod
    def from_json(text: str) -> DrawingDefaults:
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        stored = _stored_defaults().validate_json(text, strict=True)
        defaults = DrawingDefaults(stored.template, from_stored(stored))
        if "{}" not in defaults.template or not defaults.sampling.is_possible:
            raise ValueError(text)
        return defaults


@dataclass(frozen=True)
class _StoredDefaults(StoredSampling):
    template: str = field(kw_only=True)


@cache  # the page reads the defaults of every version for each order
def _stored_defaults() -> TypeAdapter[_StoredDefaults]:
    from pydantic import TypeAdapter

    return TypeAdapter(_StoredDefaults)
