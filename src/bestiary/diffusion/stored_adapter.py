"""An adapter's file as stored: its tensors and its settings, read within limits, whatever they mean.

Anyone can write such a file. Its size, names and nesting are checked before any work depends on them, and nothing in it
is ever run: pickles are unpickled with nothing but tensors allowed.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from bestiary.diffusion.adapter_format import CONFIG_KEY, FEW_STEP_KEY, FILE_NAME, KOHYA_CONFIG_KEY, PROVENANCE_KEY
from bestiary.errors import BestiaryError, shown
from bestiary.files import check_writable, is_file, is_folder

if TYPE_CHECKING:
    import torch

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# The files of a folder by who writes them: diffusers and this project, or PEFT. Safetensors are preferred to pickles.
FOLDERS = ((FILE_NAME, "pytorch_lora_weights.bin"), PEFT_WEIGHTS)
SETTINGS = (CONFIG_KEY, KOHYA_CONFIG_KEY, PROVENANCE_KEY, FEW_STEP_KEY)  # the metadata that is parsed
MIB = 2**20
# SDXL's largest adapters have some 8,000 tensors and a header of 2 MiB; kohya adds its table of tags.
MAX_HEADER = 8 * MIB
MAX_TENSORS = 20_000
MAX_NAME = 500  # characters of a tensor's name
MAX_SETTINGS = MIB  # bytes of JSON text
MAX_NESTING = 32


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's file as stored. `peft_config` is untrusted JSON: the config beside PEFT's weights."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    peft_config: Mapping[str, Any]
    pickled: bool


def adapter_file(path: str | Path) -> Path:
    """The adapter's weights: `path` itself, or the file in the folder `path`.

    Raises BestiaryError when there is none, or when a folder holds two adapters.
    """
    path = Path(path)
    if is_folder(path):
        found = ([path / name for name in names if (path / name).is_file()] for names in FOLDERS)
        files = [same[0] for same in found if same]
    else:
        files = [path] if is_file(path) else []
    if not files:
        parts = [str(part) for part in (path / "unet", path / "text_encoder") if is_file(part / PEFT_CONFIG)]
        # PEFT's own scripts save each network's adapter in a folder of its own.
        hint = f" It has adapters in {' and '.join(parts)}. Name them, each with its own --adapter." if parts else ""
        raise BestiaryError(f"There is no adapter at {shown(str(path), 200)}.{hint}")
    if len(files) > 1:
        raise BestiaryError(f"{path} holds two adapters. Name one of them: {files[0].name} or {files[1].name}.")
    return files[0]


def target_file(target: Path, name: str = FILE_NAME) -> Path:
    """The file to write an adapter to: `target` if it is a .safetensors file, else `name` in the folder `target`.

    Raises BestiaryError when `target` is neither, or cannot be written.
    """
    if target.suffix not in ("", ".safetensors"):
        raise BestiaryError(f"{target} is neither a folder nor a .safetensors file. Choose another name.")
    file = target if target.suffix else target / name
    check_writable(file.parent)
    return file


def deciding_files(file: Path) -> list[Path]:
    """The files that decide what the adapter in `file` draws: PEFT keeps a config beside its weights."""
    config = file.with_name(PEFT_CONFIG)
    return [file, config] if file.name in PEFT_WEIGHTS and config.is_file() else [file]


def is_pickle(file: Path) -> bool:
    """Whether a file is a torch pickle, whatever its name says."""
    with file.open("rb") as opened:
        start = opened.read(9)
    # An old torch file starts with pickle's own mark; in a safetensors file a brace follows the header's 8-byte length.
    return start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[8:9] != b"{")


def open_adapter(file: Path) -> StoredAdapter:
    """Read an adapter's file. Raises BestiaryError when it is broken, or larger than an adapter's can be."""
    config: dict[str, Any] = {}
    for beside in deciding_files(file)[1:]:
        if beside.stat().st_size > MAX_SETTINGS:
            raise too_large(beside, "its size", f"{MAX_SETTINGS // MIB} MiB")
        config = read_object(beside.read_bytes(), beside)
    if is_pickle(file):
        return StoredAdapter(file, _read_pickle(file), {}, config, pickled=True)
    tensors, metadata = _read_safetensors(file)
    return StoredAdapter(file, tensors, metadata, config, pickled=False)


def read_object(text: str | bytes | None, file: Path, key: str = "") -> dict[str, Any]:
    """The JSON object in a file's metadata or config; empty when there is none.

    Raises BestiaryError when it is something else, or nested too deeply.
    """
    try:
        content = json.loads("{}" if text is None else text)
    except (ValueError, RecursionError):  # not JSON, nested too deeply, or with a number too long for Python
        content = None
    if not isinstance(content, dict):
        raise broken_config(file)
    if _nesting(content) > MAX_NESTING:
        raise too_large(file, f"the nesting of {key or 'its config'}", f"{MAX_NESTING} levels")
    return content


def stored_provenance(file: Path) -> dict[str, Any]:
    """What the file says it was made from, read from its header without torch; empty if another program wrote it.

    Raises BestiaryError when it is not a readable safetensors file.
    """
    with _opened(file, "np") as content:
        metadata = content.metadata() or {}
    return read_object(metadata.get(PROVENANCE_KEY), file, PROVENANCE_KEY)


def broken_config(file: Path, reason: str = "") -> BestiaryError:
    """The error for a header that does not hold what it should."""
    return BestiaryError(
        f"The adapter {file} has a broken config{reason and f': {reason}'}. Get another copy of the file."
    )


def too_large(file: Path, what: str, limit: str) -> BestiaryError:
    """The error for a file that would take long to read, or much memory."""
    return BestiaryError(f"{file} is no adapter that can be read: {what} is over the limit of {limit}.")


def _nesting(content: object) -> int:
    """How deeply lists and objects are nested, without recursion."""
    level, depth = [content], 0
    while level and depth <= MAX_NESTING:
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level, depth = inner, depth + 1
    return depth


def check_size(file: Path) -> None:
    """Raise BestiaryError when reading the adapter's file would take long: its header is bounded, without torch."""
    if is_pickle(file):
        return
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if MAX_HEADER < length < file.stat().st_size:  # a longer one is no safetensors file at all
        raise too_large(file, f"its header of {length / MIB:.0f} MiB", f"{MAX_HEADER // MIB} MiB")
    with _opened(file, "np") as content:
        _check_names(content.keys(), file)
        for key, text in (content.metadata() or {}).items():
            if key in SETTINGS and len(text) > MAX_SETTINGS:
                raise too_large(file, f"{key} in its metadata", f"{MAX_SETTINGS // MIB} MiB")


def _read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    check_size(file)
    with _opened(file, "pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}, dict(content.metadata() or {})  # noqa: SIM118


@contextlib.contextmanager
def _opened(file: Path, framework: Literal["np", "pt"]) -> Iterator[Any]:
    try:
        with safe_open(file, framework=framework) as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise BestiaryError(f"{file} is not a readable safetensors file ({shown(str(error), 200)}).") from None


def _check_names(names: Collection[str], file: Path) -> None:
    if len(names) > MAX_TENSORS:
        raise too_large(file, f"its number of tensors, {len(names):,},", f"{MAX_TENSORS:,}")
    for name in names:
        if len(name) > MAX_NAME:
            raise too_large(file, f"the name {shown(name, 20)}", f"{MAX_NAME} characters")


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        _check_zip(file)
        with file.open("rb") as opened:  # given a path, torch would choose the format by its suffix
            content = torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BestiaryError(f"{file} holds code or objects besides tensors, so it was not read.") from None
    except BestiaryError:
        raise
    except Exception as error:  # torch passes on whatever a broken file makes its parts raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BestiaryError(f"{file} is a broken file ({shown(reason, 200)}).") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise BestiaryError(f"{file} holds no table of tensors.")
    _check_names(content.keys(), file)
    # A pickle can describe one stored number as a tensor of any size.
    if sum(value.numel() * value.element_size() for value in content.values()) > file.stat().st_size:
        raise too_large(file, "what its tensors would hold", "its own size")
    return content


def _check_zip(file: Path) -> None:
    """Refuse a zip that torch did not write: torch compresses nothing."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise BestiaryError(f"{file} holds compressed parts, which torch does not write. Get another copy.")
            if part.filename.endswith("data.pkl") and part.file_size > MAX_HEADER:
                raise too_large(file, "its table of tensors", f"{MAX_HEADER // MIB} MiB")
