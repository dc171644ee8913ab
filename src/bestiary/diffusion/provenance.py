"""What an adapter is made from: the provenance in its file, and the name of its run's checkpoints."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from bestiary.diffusion.adapter_format import Provenance
from bestiary.diffusion.base import base_commit, base_sha256, device_and_dtype, processes
from bestiary.diffusion.low_memory import low_memory
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from bestiary.diffusion.latents import Latents
    from bestiary.params import Distill, Model, Train

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("torch", "diffusers", "peft")
# Settings that do not change the weights of a step, only which pictures are drawn of it and which files are kept.
SHEET_SETTINGS = {"sheet_animals", "sheet_seeds", "sheet_steps", "sheet_guidance_scale", "keep_checkpoints"}


class Origin(TypedDict):
    """The base, the data and the size, with the field names of `Provenance`."""

    base: str
    base_revision: str | None
    base_sha256: str
    data_sha256: str
    resolution: int


def training_provenance(base: Model, latents: Latents, settings: Train, *, seed: int, resolution: int) -> Provenance:
    """The provenance of the adapter that these settings train on these latents.

    With `low_memory` on, it has the settings that this stands for here; while it is off, the key is left out.
    Raises BestiaryError when the latents were encoded with another base, and as `low_memory` does.
    """
    settings = low_memory(settings, processes().num_processes)
    unused = SHEET_SETTINGS | {"checkpoint_seconds"}
    if not settings.low_memory:
        unused.add("low_memory")
    if settings.preservation.kind == "none":
        unused.add("preservation")
    elif settings.preservation.kind != "noised":  # the base's pictures are drawn as the sheet is
        unused -= {"sheet_steps", "sheet_guidance_scale"}
    made_with: dict[str, object] = {**settings.model_dump(exclude=unused), "seed": seed}
    return Provenance(**_origin(base, latents, resolution), params=made_with)


def distillation_provenance(
    base: Model,
    latents: Latents,
    settings: Distill,
    sources: tuple[str, str | None],
    *,
    seed: int,
    resolution: int,
) -> Provenance:
    """The provenance of the few-step adapter that is made from an adapter with these settings.

    `sources`: the SHA-256 of that adapter, and that of the published few-step adapter combined with it; None if the
    few-step adapter is distilled here.
    Raises BestiaryError when the latents were encoded with another base.
    """
    made_with = settings.model_dump(exclude=SHEET_SETTINGS | {"checkpoint_seconds"}, by_alias=True)
    facts = {**_origin(base, latents, resolution), "params": {**made_with, "seed": seed}}
    hashes = dict(zip(("adapter_sha256", "few_step_sha256"), sources, strict=True))
    distilled_from = {key: sha256 for key, sha256 in hashes.items() if sha256}
    return Provenance.model_validate({**facts, "distilled_from": distilled_from})


def _origin(base: Model, latents: Latents, resolution: int) -> Origin:
    """The common starting point of training and distillation."""
    sha256 = base_sha256(base.model, base.revision)
    if sha256 != latents.training.base_sha256:
        raise BestiaryError(
            f"The latents were encoded with another base than {base.model}. Run the encode stage again."
        )
    return {
        "base": base.model,
        "base_revision": base_commit(base.model, base.revision),
        "base_sha256": sha256,
        "data_sha256": latents.training.data_sha256,
        "resolution": resolution,
    }


def checkpoint_key(provenance: Provenance, settings: Train | Distill, judge: str) -> str:
    """The name of the folder for one run's checkpoints: it changes with everything that decides the result.

    That is what the adapter is trained from, the sheet and the `judge` (its content hash), because they may choose the
    best step, this machine's device and dtype, and the code. The key hashes the whole package and the scripts of the
    stages, because a hand-kept list of files would go stale, and the versions of the libraries that compute.
    """
    device, dtype = device_and_dtype()
    sheet = json.dumps(settings.model_dump(include=SHEET_SETTINGS), sort_keys=True)
    digest = hashlib.sha256("\n".join([provenance.to_json(), sheet, judge, device.type, str(dtype)]).encode())
    digest.update(repr([version(name) for name in LIBRARIES]).encode())
    for module in sorted([*PACKAGE.rglob("*.py"), *Path("stages").glob("*.py")]):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:16]
