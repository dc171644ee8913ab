"""From a registry address, a folder or a file to an adapter on this disk and the base that it belongs to."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from platformdirs import user_cache_path

from bestiary.diffusion.export_format import MANIFEST, Manifest, is_export, read_manifest
from bestiary.diffusion.single_file import PICKLES, SUFFIX, is_single_file
from bestiary.errors import BestiaryError, shown
from bestiary.files import is_file, is_folder, project_root, write_atomically
from bestiary.registry import fast_variant as fast_variants
from bestiary.registry.fast_variant import is_accepted
from bestiary.registry.tags import read_tags
from bestiary.registry.versions import REGISTER, Version, find_version, local_database, weights
from bestiary.samplers import DrawingDefaults, Sampling
from bestiary.subjects import Subject

Obstacle = Callable[[Manifest], str | None]  # why not to draw with an export, as a clause; None: nothing against it
MAX_NAME = 200  # characters of an id on the Hugging Face hub; the hub allows 96 for each of its two parts


@dataclass(frozen=True)
class Adapter:
    """An adapter on this disk, and the base that it was trained on as far as that is known.

    For an export, `file` is its manifest. The export contains base and adapter.
    """

    file: Path
    uri: str  # how the user named it; for a registered version, models:/name/number
    base: str | None
    base_revision: str | None
    base_sha256: str | None
    defaults: DrawingDefaults | None = None  # how it was evaluated, or is meant to be drawn with
    notes: tuple[str, ...] = ()  # what was assumed about it, for the user to read
    few_step: bool = False  # a few-step adapter; `defaults` then has its steps
    subjects: tuple[Subject, ...] = ()  # that a registered adapter was taught, in the words of its captions
    export: Path | None = None  # the folder of an OpenVINO export of it, or of its accepted fast variant
    no_export: str = ""  # why its accepted fast variant cannot be used, in a sentence
    not_downloaded: str = ""  # why its accepted fast variant was left on the server, as a clause
    has_fast_variant: bool = False  # its version has an accepted one, even if its files were not looked up

    @property
    def is_export(self) -> bool:
        """Whether this is itself an export. Only the engine that it was made for can draw with it."""
        return self.export is not None and self.file == self.export / MANIFEST

    def check_is_file(self) -> None:
        """Raise BestiaryError when this is an export, because an adapter cannot be extracted from it."""
        if self.is_export:
            raise BestiaryError(f"{self.uri} is an export, which has no adapter file. Name the adapter itself.")


def needs_mlflow(what: str) -> bool:
    """Whether `resolve` must import MLflow to find `what`, which takes as long as importing torch."""
    return what.startswith("models:") and local_database() is None


def resolve(what: str, *, fast: Obstacle | None = None) -> Adapter:
    """The adapter that `what` names: `models:/...`, a folder, or a file. A registered file's hash is checked.

    With `fast`, a registered adapter includes the export of its fast variant if that was accepted, or the reason why it
    cannot be used. An export on a server is downloaded only if `fast` has nothing against it.
    Raises BestiaryError when there is no such adapter, or when its file has changed.
    """
    from bestiary.diffusion.stored_adapter import adapter_file, check_size

    if not what.startswith("models:"):
        if is_export(what):
            return _from_export(Path(what))
        file = adapter_file(what)
        check_size(file)  # before torch is imported, which takes seconds
        return _from_file(file, what)

    version = find_version(what)
    tags = read_tags(version)
    file = _registered_file(version, tags.adapter_sha256)
    export, no_export, not_downloaded = None, "", None
    if fast and is_accepted(version):
        try:
            not_downloaded = fast_variants.reason_against_download(version, fast_cache(), fast)
            export = None if not_downloaded else fast_variant(version)
            if export:
                read_manifest(export)
        except BestiaryError as error:  # torch draws with the adapter all the same
            no_export = str(error)
    return Adapter(
        file,
        version.uri,
        tags.base,
        tags.base_revision,
        tags.base_sha256,
        tags.defaults,
        few_step=tags.defaults is not None and tags.defaults.sampling.timesteps is not None,
        subjects=tags.subjects,
        export=export,
        no_export=no_export,
        not_downloaded=not_downloaded or "",
        has_fast_variant=is_accepted(version),
    )


def _from_export(folder: Path) -> Adapter:
    manifest = read_manifest(folder)
    return Adapter(
        folder / MANIFEST,
        str(folder),
        manifest.base,
        manifest.base_revision,
        manifest.base_sha256,
        manifest.defaults,
        few_step=manifest.few_step,
        export=folder,
    )


def _from_file(file: Path, what: str) -> Adapter:
    from bestiary.diffusion.adapter_format import spread
    from bestiary.diffusion.adapter_reading import read_adapter

    content = read_adapter(file)
    provenance = content.provenance
    notes = []
    if content.alpha_rule:
        notes.append(f"{what}: the alpha {spread(content.alphas)} was assumed: {content.alpha_rule}.")
    if content.few_step:
        source = "its name" if content.few_step.timesteps is None else "its file"
        notes.append(f"{what} is a few-step adapter according to {source}. Default: {_in_words(content.few_step)}.")
    return Adapter(
        file,
        what,
        provenance.base,
        provenance.base_revision,
        provenance.base_sha256,
        DrawingDefaults(sampling=content.few_step) if content.few_step else None,
        tuple(notes),
        few_step=content.few_step is not None,
    )


def _in_words(sampling: Sampling) -> str:
    steps = f"{sampling.steps} step{'s' if sampling.steps > 1 else ''} of the sampler {sampling.sampler}"
    return f"{steps}, " + (f"guidance {sampling.guidance_scale:g}" if sampling.guidance_scale > 1 else "no guidance")


def _registered_file(version: Version, sha256: str) -> Path:
    """The file of a registered version, whose content is checked. A download is kept in the user's cache folder."""
    from bestiary.diffusion.adapter import adapter_sha256
    from bestiary.diffusion.adapter_format import FILE_NAME
    from bestiary.diffusion.stored_adapter import adapter_file

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


def fast_variant(version: Version) -> Path | None:
    """The verified export of a version's fast variant; None if no fast variant was accepted.

    An export from a server is downloaded once, to the user's cache folder. Raises BestiaryError when its files are lost
    or have changed.
    """
    return fast_variants.find_stored(version, fast_cache()).export if is_accepted(version) else None


def fast_cache() -> Path:
    """The cache folder for fast variants from servers, next to the one for adapters."""
    return cache_folder().with_name("fast")


def how_to_restore_fast_variant(export: Path) -> str:
    """What to do when a file of a version's fast variant is damaged, in a sentence."""
    return fast_variants.how_to_restore(export, fast_cache())


def find_base(adapter: Adapter, base: str | None = None, known: Collection[str] = ()) -> str:
    """The folder or hub id of the adapter's base: `base` if given, else the one that the adapter names.

    Whoever can write a tag or a file can name a base on the hub. It is used only if it is one of the `known` ones.
    Raises BestiaryError when it is not, and when the adapter names no base, or a folder that does not exist here.
    """
    if base is not None:
        return locate_base(base)
    if adapter.base is None:
        raise BestiaryError(f"{adapter.uri} does not say which base it was trained on. Name the base with --base.")
    return locate_known_base(adapter.base, adapter.uri, known)


def locate_known_base(named: str, by: str, known: Collection[str]) -> str:
    """The folder or hub id of a base that an adapter or a picture names.

    Raises BestiaryError for a folder that does not exist, and for an id on the hub that is not one of the `known` ones.
    """
    located = locate_base(named, f" that {by} names")
    if not (is_folder(located) or is_file(located)) and located not in known:
        raise BestiaryError(
            f"{by} names the base {shown(named)}, which is neither a folder here nor this project's base. "
            f"If you trust it, name it yourself: --base {shown(named)}"
        )
    return located


def check_base(adapter: Adapter, model: str, sha256: str) -> None:
    """Raise BestiaryError when the base `model` with this SHA-256 is not the one that the adapter was trained on.

    A different base of the same shapes would load the adapter without an error and draw wrong pictures.
    """
    if adapter.base_sha256 and sha256 != adapter.base_sha256:
        raise BestiaryError(
            f"{adapter.uri} was trained on another base than {model}: on {shown(adapter.base or 'one')} with the "
            f"SHA-256 {shown(adapter.base_sha256, 12)}. To draw with {model} anyway, choose that base explicitly."
        )


def locate_base(named: str, whose: str = "") -> str:
    """A base's folder or file, relative to here or to the project's root. Another name is returned as a hub id.

    `whose` completes the error's "The base ...". Raises BestiaryError when a path does not exist, or is a
    pickle.
    """
    for place in (Path(named), project_root() / named):
        if is_folder(place) or is_single_file(place):
            return str(place.resolve())
    if named.startswith(("/", "./")) or named.endswith((SUFFIX, *PICKLES)) or len(named) > MAX_NAME:
        raise BestiaryError(
            f"The base {shown(named, 200)}{whose} does not exist here. Run this in a clone of its project, or name the "
            "base's folder or file with --base."
        )
    return named


def pull_fast(what: str, out: Path) -> list[Path]:
    """Copy the fast variant of a registered version to `out` and verify it. Returns the folders of adapter and export.

    Raises BestiaryError when there is none, it was refused, or its files are lost or have changed.
    """
    return fast_variants.pull_fast(what, out, fast_cache())


def pull(what: str, out: Path, base: str | None = None, known: Collection[str] = ()) -> Path:
    """Copy an adapter to the folder `out` after verifying that it applies to its base. Returns the file.

    `known` are the bases that may be downloaded without being named.
    Raises BestiaryError when there is no such adapter or base, or when the base is not the one it was trained on.
    """
    from bestiary.diffusion.adapter import verify_adapter
    from bestiary.diffusion.stored_adapter import deciding_files

    adapter = resolve(what)
    adapter.check_is_file()
    model = find_base(adapter, base, known)
    verification = verify_adapter(adapter.file, model, None if base else adapter.base_revision)
    if verification.base_is_the_trained_one is False:
        raise BestiaryError(
            f"{adapter.uri} was trained on another base than {model}: on {adapter.base} with the SHA-256 "
            f"{adapter.base_sha256}. Name the folder of that base with --base."
        )
    for file in deciding_files(adapter.file):
        write_atomically(out / file.name, file.read_bytes())
    return out / adapter.file.name
