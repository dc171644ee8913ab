"""Adapters that were distilled to draw in a few steps, and how each kind wants to be drawn.

Their weights look like any other adapter's. The file of one that this project distilled says how to draw with it.
Others are recognised by their published names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from bestiary.errors import BestiaryError
from bestiary.samplers import SAMPLERS, Sampling

LCM = Sampling("lcm", steps=4, guidance_scale=1.0)  # LCM-LoRA, arXiv:2311.05556
TCD = Sampling("tcd", steps=4, guidance_scale=1.0)  # trajectory consistency distillation, arXiv:2402.19159
GUIDED = 5.0  # the lowest scale that Hyper-SD's authors advise for the adapters that keep guidance
AT_TIMESTEPS = ("lcm", "tcd")  # the samplers that predict the clean picture at each given timestep
MAX_NAME = 1000  # characters of a name that are looked at


def few_step_sampling(names: Iterable[str]) -> Sampling | None:
    """How to draw with an adapter that one of these names calls a few-step adapter; None when no name does.

    >>> found = few_step_sampling(["Hyper-SD15-8steps-lora"])
    >>> found.sampler, found.steps, found.guidance_scale
    ('ddim-trailing', 8, 1.0)
    """
    for name in (name[:MAX_NAME].lower() for name in names):
        if re.search(r"hyper[-_ ]?sd", name):
            return _hyper_sd(name)
        for word, sampling in (("lcm", LCM), ("tcd", TCD)):
            if re.search(rf"(?<![a-z]){word}(?![a-z])", name):
                return sampling
    return None


def check_few_step(sampling: Sampling) -> None:
    """Raise BestiaryError when the sampling does not match the timesteps that a few-step adapter was distilled for."""
    if sampling.timesteps is None:
        return
    distilled = f"{len(sampling.timesteps)} step{'s' if len(sampling.timesteps) > 1 else ''}"
    if sampling.steps != len(sampling.timesteps):
        raise BestiaryError(
            f"This adapter was distilled for {distilled}, not for {sampling.steps}. Draw with {distilled}."
        )
    if sampling.guidance_scale > 1:
        raise BestiaryError(
            f"This adapter was distilled for {distilled} without guidance, not for guidance scale "
            f"{sampling.guidance_scale:g}. Draw with guidance scale 1."
        )
    if sampling.sampler not in AT_TIMESTEPS:
        samplers = " or ".join(AT_TIMESTEPS)
        raise BestiaryError(
            f"The sampler {SAMPLERS[sampling.sampler].label} cannot draw at the timesteps that this adapter was "
            f"distilled for. Draw with {samplers}."
        )


def _hyper_sd(name: str) -> Sampling:
    """Hyper-SD (arXiv:2404.13686): an adapter for each number of steps, and one for any number with TCD's sampler."""
    steps = int(found[1]) if (found := re.search(r"(?<!\d)(\d{1,2})[-_ ]?steps?", name)) else TCD.steps
    guidance = GUIDED if "cfg" in name else 1.0
    own = found is not None and steps > 1
    return Sampling("ddim-trailing" if own else "tcd", steps=steps, guidance_scale=guidance)
