"""The folder of an export for OpenVINO: its files, and the manifest `bestiary.json` that describes them.

Networks, tokenizer and scheduler are where OpenVINO GenAI's and optimum-intel's own pipelines look for them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bestiary.errors import BestiaryError, shown
from bestiary.files import is_file
from bestiary.samplers import SIDE_STEP, Decoder, DrawingDefaults

Engine = Literal["torch", "openvino"]
EngineChoice = Literal["auto", "torch", "openvino"]
Precision = Literal["int8", "bf16", "fp32"]
MANIFEST = "bestiary.json"
FORMAT = 1
NETWORKS = ("text_encoder", "unet", "vae_decoder")
NETWORK_FILE, WEIGHTS_FILE = "openvino_model.xml", "openvino_model.bin"


class UnusableExportError(BestiaryError):
    """OpenVINO cannot draw with an export here; `problem` says why, in a sentence."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} {remedy}")
        self.problem = problem


class DamagedExportError(UnusableExportError):
    """A file of an export is missing, has changed or does not load."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, "Export the adapter again.")


class Manifest(BaseModel):
    """The manifest of an exported folder. `files` has the SHA-256 of every other file by its path in the folder.

    adapter_sha256 is the SHA-256 of the adapter in the UNet, and distilled_from_sha256 that of the adapter that it was
    distilled from, if known.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1]
    engine: Literal["openvino"]
    precision: Precision
    decoder: Decoder
    base: str
    base_revision: str | None
    base_sha256: str
    adapter: str
    adapter_sha256: str
    adapter_weight: float = Field(default=1.0, gt=0)  # that the adapter was fused with
    distilled_from_sha256: str | None = None
    few_step: bool
    drawing: dict[str, Any]  # the fields of `DrawingDefaults`, as `to_dict` gives them
    side: int = Field(gt=0)  # pixels; the size of the pictures that the base was trained on
    side_step: int = Field(default=SIDE_STEP, gt=0)  # the sides of pictures are multiples of this
    processor: str  # of the machine that made the export
    versions: dict[str, str]
    files: dict[str, str]

    @property
    def defaults(self) -> DrawingDefaults:
        """How to draw with it. Raises ValueError when `drawing` is invalid."""
        return DrawingDefaults.from_json(json.dumps(self.drawing))


def is_export(path: str | Path) -> bool:
    """Whether this is a folder that `bestiary export` wrote."""
    return is_file(Path(path) / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an exported folder.

    Raises BestiaryError when it is missing, is damaged, or has the format of another version.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except OSError:
        raise BestiaryError(
            f"{folder} has no {MANIFEST}, so it is not an export. Make one with `bestiary export`."
        ) from None
    except (ValueError, RecursionError):
        raise _damaged(folder) from None
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, int) and found != FORMAT:
        raise BestiaryError(
            f"The export in {folder} has format {found}, but this version reads format {FORMAT}. Export it again."
        )
    try:
        manifest = Manifest.model_validate_json(json.dumps(content))
        _ = manifest.defaults
    except (ValueError, RecursionError):
        raise _damaged(folder) from None
    if outside := next((name for name in manifest.files if not _is_inside(name)), None):
        raise BestiaryError(f"The export in {folder} names {shown(outside)}, which is outside of it. Export it again.")
    return manifest


def _is_inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _damaged(folder: Path) -> BestiaryError:
    return BestiaryError(f"The {MANIFEST} in {folder} is damaged. Export the adapter again.")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise DamagedExportError when a file of the export is missing or has changed."""
    for name, sha256 in manifest.files.items():
        if not is_file(folder / name):
            raise DamagedExportError(f"The export in {folder} has no {name}.")
        if file_sha256(folder / name) != sha256:
            raise DamagedExportError(f"{folder / name} has changed since it was exported.")


def hash_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in the folder except the manifest, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file. That of an export's manifest identifies the whole folder."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
