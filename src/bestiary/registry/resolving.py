"""From a registry address, a folder or a file to an adapter on this disk and the base that it belongs to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from platformdirs import user_cache_path

from bestiary.errors import BestiaryError
from bestiary.files import project_root, write_atomically
from bestiary.registry.tags import read_tags
from bestiary.registry.versions import REGISTER, Version, find_version, local_database, weights
from bestiary.samplers import DrawingDefaults


@dataclass(frozen=True)
class Adapter:
    """An adapter on this disk, and the base that it was trained on as far as that is known."""

    file: Path
    uri: str  # how the user named it; for a registered version, models:/name/number
    base: str | None
    base_revision: str | None
    base_sha256: str | None
    defaults: DrawingDefaults | None = None  # how a registered adapter was evaluated


def needs_mlflow(what: str) -> bool:
    """Whether `resolve` must import MLflow to find `what`, which takes as long as importing torch."""
    return what.startswith("models:") and local_database() is None


def resolve(what: str) -> Adapter:
    """The adapter that `what` names: `models:/...`, a folder, or a file. A registered file's hash is checked.

    Raises BestiaryError when there is no such adapter, or when a registered file has changed.
    """
    from bestiary.diffusion.adapter import adapter_file, read_provenance

    if not what.startswith("models:"):
        file = adapter_file(what)
        provenance = read_provenance(file)
        return Adapter(file, what, provenance.base, provenance.base_revision, provenance.base_sha256)
    version = find_version(what)
    tags = read_tags(version)
    file = _registered_file(version, tags.adapter_sha256)
    return Adapter(file, version.uri, tags.base, tags.base_revision, tags.base_sha256, tags.defaults)


def _registered_file(version: Version, sha256: str) -> Path:
    """The file of a registered version, whose content is checked. A download is kept in the user's cache folder."""
    from bestiary.diffusion.adapter import adapter_file, adapter_sha256
    from bestiary.diffusion.adapter_format import FILE_NAME

    cached = cache_folder() / sha256 / FILE_NAME
    if local_database() is None and cached.is_file() and adapter_sha256(cached) == sha256:
        return cached
    with TemporaryDirectory() as temporary:
        file = adapter_file(weights(version, Path(temporary)))
        if adapter_sha256(file) != sha256:
            place = "on the server" if file.is_relative_to(temporary) else str(file)
            raise BestiaryError(
                f"The file of {version.uri} has changed since it was registered: {place}. If it is the adapter in "
                f"models/adapter, `{REGISTER}` stores it again; otherwise restore it from a backup."
            )
        if file.is_relative_to(temporary):
            write_atomically(cached, file.read_bytes())
            file = cached
    return file


def cache_folder() -> Path:
    """The folder for adapters from servers: below BESTIARY_CACHE, or below `bestiary` in the user's cache folder."""
    return Path(os.environ.get("BESTIARY_CACHE") or user_cache_path("bestiary")) / "adapters"


def find_base(adapter: Adapter, base: str | None = None) -> str:
    """The folder or hub id of the adapter's base: `base` if given, else the one that the adapter names.

    Raises BestiaryError when the adapter names none, or a folder that does not exist here.
    """
    named = base or adapter.base
    if named is None:
        raise BestiaryError(f"{adapter.uri} does not say which base it was trained on. Name the base with --base.")
    return locate_base(named, f" that {adapter.uri} was trained on")


def check_base(adapter: Adapter, model: str) -> None:
    """Raise BestiaryError when the folder `model` is not the base that the adapter was trained on.

    A different base of the same shapes would load the adapter without an error and draw wrong pictures. A base from
    the hub is pinned by its revision instead.
    """
    from bestiary.diffusion.base import base_sha256

    if adapter.base_sha256 and Path(model).is_dir() and base_sha256(model) != adapter.base_sha256:
        raise BestiaryError(
            f"{adapter.uri} was trained on another base than {model}: on {adapter.base} with the SHA-256 "
            f"{adapter.base_sha256[:12]}. To draw with {model} anyway, choose that base explicitly."
        )


def locate_base(named: str, whose: str = "") -> str:
    """A base's folder, relative to here or to the project's root. A name that is no folder is returned as a hub id.

    `whose` completes the error's "The base ...". Raises BestiaryError when a path does not exist.
    """
    for place in (Path(named), project_root() / named):
        if place.is_dir():
            return str(place.resolve())
    if named.startswith(("/", "./")):
        raise BestiaryError(
            f"The base {named}{whose} does not exist here. Run this in a clone of its project, or name the base's "
            "folder with --base."
        )
    return named


def pull(what: str, out: Path, base: str | None = None) -> Path:
    """Copy an adapter to the folder `out` after verifying that it applies to its base. Returns the file.

    Raises BestiaryError when there is no such adapter or base, or when the base is not the one it was trained on.
    """
    from bestiary.diffusion.adapter import verify_adapter

    adapter = resolve(what)
    model = find_base(adapter, base)
    verification = verify_adapter(adapter.file, model, None if base else adapter.base_revision)
    if verification.base_is_the_trained_one is False:
        raise BestiaryError(
            f"{adapter.uri} was trained on another base than {model}: on {adapter.base} with the SHA-256 "
            f"{adapter.base_sha256}. Name the folder of that base with --base."
        )
    target = out / adapter.file.name
    write_atomically(target, adapter.file.read_bytes())
    return target
