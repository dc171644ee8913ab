"""From a registry address, a folder or a file to an adapter on this disk and the base that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bestiary.errors import BestiaryError
from bestiary.files import project_root, write_atomically
from bestiary.registry.versions import (
    Version,
    defaults_of,
    find_version,
    hide_progress_bars,
    local_database,
    open_local,
    open_registry,
    plain_errors,
)
from bestiary.samplers import DrawingDefaults
from bestiary.tracking.addresses import local_path


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
    from bestiary.diffusion.adapter import adapter_file, adapter_sha256, read_provenance

    if not what.startswith("models:"):
        file = adapter_file(what)
        provenance = read_provenance(file)
        return Adapter(file, what, provenance.base, provenance.base_revision, provenance.base_sha256)
    version = find_version(what)
    file = adapter_file(_weights_folder(version))
    tags = version.tags
    if adapter_sha256(file) != tags["adapter_sha256"]:
        raise BestiaryError(
            f"The file of {version.uri} has changed since it was registered: {file}. Restore it from a backup."
        )
    return Adapter(
        file, version.uri, tags["base"], tags["base_revision"] or None, tags["base_sha256"], defaults_of(version)
    )


def _weights_folder(version: Version) -> Path:
    """The folder with a version's weights, downloaded if they are not on this disk."""
    if path := local_database():
        with open_local(path) as database:
            files = local_path(database.files(version.name, version.version))
        if files is not None and (files / "adapter_weights").is_dir():
            return files / "adapter_weights"
    uri, client = open_registry()
    with plain_errors(uri):
        import mlflow

        hide_progress_bars()
        source = client.get_model_version_download_uri(version.name, str(version.version))
        return Path(mlflow.artifacts.download_artifacts(f"{source}/adapter_weights", tracking_uri=uri))


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
