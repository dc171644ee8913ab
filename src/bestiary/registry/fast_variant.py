"""The fast variant of a registered version: its tags, and its stored files, which are verified before use.

Among the version's files, the variant has one folder that is named after its content: FOLDER/few_step is the few-step
adapter, FOLDER/openvino the export. Storing another fast variant never changes files that somebody is reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from bestiary.diffusion.export_format import MANIFEST, Manifest, check_files, file_sha256, is_export, read_manifest
from bestiary.errors import BestiaryError
from bestiary.evaluation.acceptance import MAKE
from bestiary.files import unwritable
from bestiary.registry.tags import odd, text
from bestiary.registry.versions import (
    Version,
    download,
    file_store,
    find_version,
    local_files,
    open_registry,
    plain_errors,
)
from bestiary.samplers import DrawingDefaults

# The tags that `make fast` sets on a version, besides versions.FAST_RUN.
FAST, REASONS, DEFAULTS = "fast", "fast_reasons", "fast_usual"
FEW_STEP, EXPORT = "fast_few_step_sha256", "fast_export_sha256"
ACCEPTED: Literal["accepted"] = "accepted"
REFUSED: Literal["refused"] = "refused"
PREFIX = "fast-"  # of the folders among a version's files
ATTACH = "dvc repro --force --single-item fast/dvc.yaml:attach"
FEW_STEP_FOLDER, EXPORT_FOLDER = "few_step", "openvino"


@dataclass(frozen=True)
class FastTags:
    """The tags of a version's accepted fast variant. defaults is how to draw with it."""

    few_step_sha256: str
    export_sha256: str
    defaults: DrawingDefaults

    @property
    def folder(self) -> str:
        """Its folder among the version's files."""
        return f"{PREFIX}{hashlib.sha256(f'{self.few_step_sha256} {self.export_sha256}'.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class StoredFastVariant:
    """A fast variant on this disk: the folders of the few-step adapter and of the export."""

    few_step: Path
    export: Path
    tags: FastTags


def is_accepted(version: Version) -> bool:
    """Whether a version has an accepted fast variant."""
    return version.tags.get(FAST) == ACCEPTED


def read_fast_tags(version: Version) -> FastTags:
    """The tags of a version's fast variant.

    Raises BestiaryError when it has none, it was refused, or a tag is missing or invalid.
    """
    verdict = version.tags.get(FAST)
    if verdict is None:
        raise BestiaryError(f"{version.uri} has no fast variant. Run `{MAKE}`.")
    if verdict == REFUSED:
        reasons = version.tags.get(REASONS, "the reasons were not stored.")
        raise BestiaryError(f"The fast variant of {version.uri} was refused: {reasons}")
    if verdict != ACCEPTED:
        raise odd(version, FAST, f"{ACCEPTED} or {REFUSED}")
    for key in (FEW_STEP, EXPORT):
        if not re.fullmatch(r"[0-9a-f]{64}", text(version, key)):
            raise odd(version, key, "a SHA-256")
    try:
        defaults = DrawingDefaults.from_json(text(version, DEFAULTS))
    except (ValueError, RecursionError):
        raise odd(version, DEFAULTS, "a description of how to draw") from None
    return FastTags(version.tags[FEW_STEP], version.tags[EXPORT], defaults)


def find_stored(version: Version, cache: Path) -> StoredFastVariant:
    """A version's fast variant. One from a server is cached in the folder `cache`.

    This verifies the few-step adapter and the export's manifest. The files that the manifest lists are verified when
    the export is opened. Raises BestiaryError when the version has no fast variant, it was refused, or it is lost or
    has changed.
    """
    tags = read_fast_tags(version)
    kept = cache / tags.folder
    if is_intact(kept, tags):
        return _in(kept, tags)
    if files := local_files(version):
        found = files / tags.folder
        _check(version, found, tags, str(found))
        return _in(found, tags)
    with _written(cache) as temporary:
        _download(version, tags, temporary)
        _check(version, temporary / tags.folder, tags, "on the server", every_file=True)
        _put_in_place(temporary / tags.folder, kept)
    return _in(kept, tags)


def reason_against_download(version: Version, cache: Path, obstacle: Callable[[Manifest], str | None]) -> str | None:
    """What `obstacle` has against the export on a server, as a clause; None if `find_stored` downloads nothing.

    The manifest is small, so only that is downloaded. Raises BestiaryError when the version has no fast variant, it was
    refused, or its manifest is lost or has changed.
    """
    tags = read_fast_tags(version)
    if is_export(cache / tags.folder / EXPORT_FOLDER) or local_files(version):
        return None
    with TemporaryDirectory() as temporary:
        export = _download(version, tags, Path(temporary), part=f"/{EXPORT_FOLDER}/{MANIFEST}").parent
        if export_sha256(export) != tags.export_sha256:
            raise _changed(version, "on the server")
        return obstacle(read_manifest(export))


def how_to_restore(export: Path, cache: Path) -> str:
    """What to do when a file of a version's stored export is damaged, in a sentence."""
    if export.is_relative_to(cache):
        return f"Delete {export.parent} to download it again."
    return f"If the version is this project's, `{ATTACH}` stores it again."


def pull_fast(what: str, out: Path, cache: Path) -> list[Path]:
    """Copy the fast variant of the version `what` to `out`/few_step and `out`/openvino, verified. Returns both folders.

    Raises BestiaryError when `what` is no registered version, when `find_stored` does, or when `out` contains other
    files in these folders. Then nothing is written.
    """
    version = find_version(what)
    stored = find_stored(version, cache)
    targets = [out / FEW_STEP_FOLDER, out / EXPORT_FOLDER]
    for source, target in zip((stored.few_step, stored.export), targets, strict=True):
        _check_nothing_is_lost(source, target)
    with _written(out) as temporary:
        for source in (stored.few_step, stored.export):
            shutil.copytree(source, temporary / source.name)
        _check(version, temporary, stored.tags, str(stored.export.parent), every_file=True)
        for target in targets:
            _put_in_place(temporary / target.name, target)
    return targets


def _in(folder: Path, tags: FastTags) -> StoredFastVariant:
    return StoredFastVariant(folder / FEW_STEP_FOLDER, folder / EXPORT_FOLDER, tags)


def is_intact(folder: Path, tags: FastTags, *, every_file: bool = False) -> bool:
    """Whether the folder contains the fast variant that the tags describe. `every_file` verifies every file."""
    from bestiary.diffusion.adapter import adapter_sha256

    few_step, export = folder / FEW_STEP_FOLDER, folder / EXPORT_FOLDER
    if not few_step.is_dir() or not is_export(export):
        return False
    with contextlib.suppress(BestiaryError):  # a file is missing or has changed
        if every_file:
            check_files(export, read_manifest(export))
        return adapter_sha256(few_step) == tags.few_step_sha256 and export_sha256(export) == tags.export_sha256
    return False


def export_sha256(export: Path) -> str:
    """The SHA-256 of an export: that of its manifest, which lists the SHA-256 of every file."""
    return file_sha256(export / MANIFEST)


def _check(version: Version, folder: Path, tags: FastTags, place: str, *, every_file: bool = False) -> None:
    """Raise BestiaryError when the fast variant in a folder is missing or does not match the tags."""
    if not folder.is_dir():
        raise _lost(version, place)
    if not is_intact(folder, tags, every_file=every_file):
        raise _changed(version, place)


def _changed(version: Version, place: str) -> BestiaryError:
    return BestiaryError(
        f"The fast variant of {version.uri} has changed since it was stored: {place}. If the version is this "
        f"project's, `{ATTACH}` stores it again."
    )


def _lost(version: Version, place: str) -> BestiaryError:
    return BestiaryError(
        f"The registry has lost the fast variant of {version.uri}: {place} does not exist. If the version is this "
        f"project's, `{ATTACH}` stores it again."
    )


def _download(version: Version, tags: FastTags, folder: Path, part: str = "") -> Path:
    """Copy a version's fast variant, or one `part` of it, from the server to `folder` and return the copy."""
    uri, client = open_registry()
    with plain_errors(uri):
        found = file_store(client, version).list_artifacts(tags.folder)
    if not found:  # MLflow's own error would not say what is missing
        raise _lost(version, f"{tags.folder} on the server")
    return download(version, f"{tags.folder}{part}", folder)


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, removed afterwards, and `folder` too if it is new and empty.

    Raises BestiaryError when the folder cannot be written.
    """
    is_new, temporary = not folder.exists(), folder / f".{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as error:
        raise unwritable(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.exists():  # such as an earlier copy with a write-protected folder
            print(f"{temporary} cannot be removed. Delete it to free its space.", file=sys.stderr)
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_nothing_is_lost(source: Path, target: Path) -> None:
    """Raise BestiaryError when `target` contains anything that `source`, which is to replace it, does not have."""
    if not target.is_dir():
        return
    names, new = ({path.name for path in folder.iterdir()} for folder in (target, source))
    if lost := names - new:
        raise BestiaryError(f"{target} contains {min(lost)}, which would be lost. Choose another folder with --out.")


def _put_in_place(source: Path, target: Path) -> None:
    """Move a folder to `target`, replacing an earlier one."""
    if target.is_dir():
        target.rename(source.parent / f"replaced-{target.name}")  # removed with the temporary folder
    source.rename(target)
