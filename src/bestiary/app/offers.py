"""What the page offers to draw with: bases, registered versions, adapters of this machine, uploaded files."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bestiary.app.errors import RefusedError, public_sentence
from bestiary.app.taught import Evaluated, evaluated, taught_by_file, taught_by_version
from bestiary.diffusion.export_format import is_export
from bestiary.engine_choice import as_export
from bestiary.errors import BestiaryError
from bestiary.evaluation.report import HEADLINES
from bestiary.generation import Base, read_start_image
from bestiary.image_files import UnreadableImageError
from bestiary.samplers import DrawingDefaults, Sampling
from bestiary.subjects import Subject

if TYPE_CHECKING:
    from PIL.Image import Image

    from bestiary.png_metadata import StartImage
    from bestiary.registry.resolving import Adapter
    from bestiary.registry.versions import Version

log = logging.getLogger(__name__)

FAST = "#fast"  # suffix of the key of a registered version's fast variant


@dataclass(frozen=True)
class Offerings:
    """What the page may draw with."""

    bases: tuple[Base, ...]  # the first is the default
    adapters: tuple[str, ...] = ("models/adapter",)  # files or folders, beside the registered versions
    defaults: DrawingDefaults = field(default_factory=DrawingDefaults)  # for adapters that are not registered
    registered_name: str = "bestiary"
    tiny_decoder: Base | None = None  # for the default base


@dataclass(frozen=True)
class Offer:
    """An adapter that the page may ask for by its key. `what` is what the registry resolves; the browser never sees it.

    scores are the differences from the base, by the key of the score. defaults, subjects (what the adapter was taught)
    and side (pixels a side of the pictures that it was trained on) are None where nothing here says so. modules is how
    many modules of each network an uploaded file changes.
    """

    key: str
    kind: Literal["registry", "local", "upload"]
    label: str
    what: str
    aliases: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    defaults: DrawingDefaults | None = None
    subjects: tuple[Subject, ...] | None = None
    side: int | None = None
    sha256: str | None = None
    modules: Mapping[str, int] = field(default_factory=dict)
    few_step: bool = False  # a few-step adapter; `defaults` then has its steps
    export: bool = False  # OpenVINO draws it on the CPU, at one weight; there is no base to compare with

    @property
    def name(self) -> str:
        """The adapter's name in a picture's settings."""
        return self.key if self.kind == "registry" else self.label

    def public(self) -> dict[str, object]:
        """What the browser learns of it."""
        return {
            "key": self.key,
            "kind": self.kind,
            "label": self.label,
            "aliases": self.aliases,
            "scores": self.scores,
            "usual": self.defaults.to_dict() if self.defaults else None,
            "subjects": None if self.subjects is None else [_words(subject) for subject in self.subjects],
            "side": self.side,
            "sha256": self.sha256 and self.sha256[:8],  # tells two files of one name apart
            "modules": self.modules,
            "few_step": self.few_step,
            "export": self.export,
        }


@dataclass(frozen=True)
class UploadedImage:
    """An image that a browser uploaded to start a picture from."""

    key: str
    name: str
    file: Path
    size: tuple[int, int] = (0, 0)  # width and height in pixels, upright


@dataclass(frozen=True)
class _About:
    """The metadata of an adapter's file: time of change, training size, hash, and settings of a few-step adapter."""

    changed: int
    side: int | None
    sha256: str
    few_step: Sampling | None


class Offers:
    """Finds what is on offer, and the adapter behind an offer."""

    def __init__(self, offerings: Offerings) -> None:
        self.defaults = offerings.defaults
        self.default_base = offerings.bases[0]
        self.bases = {short_name(base.model): base for base in offerings.bases}
        self.uploads: dict[str, Offer] = {}
        self.images: dict[str, UploadedImage] = {}
        self._local = offerings.adapters
        self._registered_name = offerings.registered_name
        self._resolved: dict[str, Adapter] = {}
        self._exports: dict[str, str] = {}  # the folders of fast variants, and their labels
        self._read: dict[Path, _About] = {}

    def listed(self) -> list[Offer]:
        """The adapters that everybody may choose: registered versions, newest first, then those of this machine."""
        return [*self._registered(), *self._folders()]

    def find(self, key: str) -> Offer:
        """The offer with this key. Raises BestiaryError when it is gone."""
        # Only one of the lists is read: reading takes milliseconds, which every order waits for.
        listed = self._registered if key.startswith("models:") else self._folders
        offer = self.uploads.get(key) or next((offer for offer in listed() if offer.key == key), None)
        if offer is None:
            raise gone()
        return offer

    def base(self, key: str) -> Base | None:
        """The base with this key; None for an empty key. Raises BestiaryError when it is not on offer."""
        if key and key not in self.bases:
            raise RefusedError("noBase", "This base is not available here. Choose another one.")
        return self.bases.get(key)

    def resolve(self, offer: Offer) -> Adapter:
        """The adapter behind an offer. Raises BestiaryError when it cannot be read."""
        from bestiary.registry.resolving import resolve

        if offer.kind != "registry":
            return resolve(offer.what)
        if offer.key.endswith(FAST):
            found = resolve(offer.what, fast=lambda _: None)
            if found.no_export:
                log.warning("%s", found.no_export)
                raise BestiaryError(f"The files of {offer.label} are lost or damaged. Choose another adapter.")
            if found.export is None:  # it was refused after the page had loaded
                raise gone()
            self._exports[str(found.export)] = offer.label
            return as_export(found, found.export)
        if offer.key not in self._resolved:  # a registered version never changes
            self._resolved[offer.key] = resolve(offer.what)
        return self._resolved[offer.key]

    def add_upload(self, key: str, name: str, file: Path) -> Offer:
        """Offer an uploaded file to whoever knows its key. Raises BestiaryError when it is not an adapter."""
        from bestiary.diffusion.adapter import adapter_sha256
        from bestiary.diffusion.adapter_reading import read_adapter
        from bestiary.diffusion.few_step import few_step_sampling
        from bestiary.diffusion.stored_adapter import is_pickle

        with self.without_paths({str(file): name}):
            if is_pickle(file):
                raise BestiaryError(f"{name} is a torch pickle. Convert it with `bestiary adapter convert`.")
            content = read_adapter(file)
        sha256 = adapter_sha256(file)
        known = next((other for other in self.listed() if other.sha256 == sha256), None)
        few_step = content.few_step or few_step_sampling([Path(name).stem])
        offer = Offer(
            key,
            "upload",
            name,
            str(file),
            defaults=self._few_step(few_step),
            subjects=known.subjects if known else None,
            side=content.provenance.resolution,
            sha256=sha256,
            modules={part: len(content.modules(part)) for part in content.parts},
            few_step=few_step is not None,
        )
        self.uploads[key] = offer
        return offer

    def add_image(self, key: str, name: str, file: Path) -> UploadedImage:
        """Store an uploaded image for whoever knows its key. Raises BestiaryError when it cannot be read."""
        self.images[key] = UploadedImage(key, name, file)
        try:
            _, image = self.start_image(key, 1.0)
        except BestiaryError:
            del self.images[key]
            raise
        self.images[key] = UploadedImage(key, name, file, image.size)
        return self.images[key]

    def start_image(self, key: str, denoise: float) -> tuple[StartImage, Image]:
        """The uploaded image with this key, to start a picture from. Raises BestiaryError when it is gone."""
        image = self.images.get(key)
        if image is None:
            raise RefusedError("goneImage", "The picture to start from is no longer here. Choose it again.")
        with self.without_paths():
            try:
                return read_start_image(image.file, denoise)
            except UnreadableImageError as error:
                raise RefusedError(
                    "noImage", "{name} cannot be read as a picture. Choose another file.", name=image.name
                ) from error

    def forget(self, key: str) -> None:
        """Delete an upload."""
        if offer := self.uploads.pop(key, None):
            Path(offer.what).unlink(missing_ok=True)
        if image := self.images.pop(key, None):
            image.file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def without_paths(self, names: Mapping[str, str] | None = None) -> Iterator[None]:
        """Replace paths in errors by names: users of the page must not learn this machine's folders."""
        try:
            yield
        except RefusedError:
            raise
        except BestiaryError as error:
            known = {str(adapter.file): key for key, adapter in self._resolved.items()}
            known |= {path: short_name(path) for path in (*self._local, *(base.model for base in self.bases.values()))}
            known |= self._exports
            known |= {offer.what: offer.label for offer in self.uploads.values()} | dict(names or {})
            known |= {str(image.file): image.name for image in self.images.values()}
            sentence = str(error)
            for path in sorted(known, key=len, reverse=True):
                sentence = sentence.replace(path, known[path])
            raise BestiaryError(public_sentence(BestiaryError(sentence))) from None

    def _registered(self) -> list[Offer]:
        from bestiary.registry.fast_variant import is_accepted
        from bestiary.registry.versions import versions

        try:
            found = versions(self._registered_name)
        except BestiaryError as error:  # without a registry, the base and local adapters still draw
            log.info("%s", error)
            return []
        last = evaluated()
        offers = []
        for version in reversed(found):
            offers.append(_registered_offer(version, last))
            if is_accepted(version) and find_spec("openvino"):
                with contextlib.suppress(BestiaryError):  # invalid tags of one version must not hide the other adapters
                    offers.append(_fast_offer(version, offers[-1]))
        return offers

    def _folders(self) -> list[Offer]:
        from bestiary.diffusion.stored_adapter import adapter_file

        offers = []
        last = evaluated()
        for number, path in enumerate(self._local):
            with contextlib.suppress(BestiaryError):  # models/adapter and models/fast exist only after a run
                if is_export(path):
                    offers.append(_export_offer(number, Path(path)))
                    continue
                about = self._about(adapter_file(path))
                offers.append(
                    Offer(
                        f"local:{number}",
                        "local",
                        short_name(path),
                        path,
                        defaults=self._few_step(about.few_step),
                        subjects=taught_by_file(about.sha256, last),
                        side=about.side,
                        sha256=about.sha256,
                        few_step=about.few_step is not None,
                    )
                )
        return offers

    def _about(self, file: Path) -> _About:
        """The metadata of an adapter's file. It is read again when the file has changed."""
        from bestiary.diffusion.adapter import adapter_sha256
        from bestiary.diffusion.adapter_reading import read_adapter

        changed = file.stat().st_mtime_ns
        known = self._read.get(file)
        if known is None or known.changed != changed:
            side, few_step = None, None
            with contextlib.suppress(BestiaryError):  # drawing with a broken file reports it
                content = read_adapter(file)
                side, few_step = content.provenance.resolution, content.few_step
            known = self._read[file] = _About(changed, side, adapter_sha256(file), few_step)
        return known

    def _few_step(self, sampling: Sampling | None) -> DrawingDefaults | None:
        """The usual defaults with the sampling of a few-step adapter."""
        return replace(self.defaults, sampling=sampling) if sampling else None


def _fast_offer(version: Version, offer: Offer) -> Offer:
    """The offer of a version's accepted fast variant, in addition to the `offer` of the version itself."""
    from bestiary.registry.fast_variant import read_fast_tags

    return replace(
        offer,
        key=f"{version.uri}{FAST}",
        label=f"{offer.label}, fast (OpenVINO)",
        aliases=(),
        scores={},
        defaults=read_fast_tags(version).defaults,
        few_step=True,
        export=True,
    )


def _export_offer(number: int, folder: Path) -> Offer:
    """The offer of an OpenVINO export. Raises BestiaryError when its manifest is damaged."""
    from bestiary.diffusion.export_format import read_manifest

    manifest = read_manifest(folder)
    return Offer(
        f"local:{number}",
        "local",
        f"{short_name(str(folder))} (OpenVINO {manifest.precision}, {manifest.decoder} decoder)",
        str(folder),
        defaults=manifest.defaults,
        side=manifest.side,
        sha256=manifest.adapter_sha256,
        few_step=manifest.few_step,
        export=True,
    )


def _registered_offer(version: Version, last: Evaluated) -> Offer:
    from bestiary.registry.tags import defaults_of

    tags, defaults = version.tags, defaults_of(version)
    return Offer(
        key=version.uri,
        kind="registry",
        label=f"{version.name} {version.version}",
        what=version.uri,
        aliases=tuple(version.aliases),
        scores={score: gain for score in HEADLINES if (gain := _number(tags.get(f"delta.{score}"))) is not None},
        defaults=defaults,
        subjects=taught_by_version(version, last),
        side=defaults.sampling.width if defaults else None,
        sha256=tags.get("adapter_sha256"),
        few_step=defaults is not None and defaults.sampling.timesteps is not None,
    )


def gone() -> RefusedError:
    """The error for an adapter that was there before."""
    return RefusedError("gone", "This adapter is no longer here. Choose another one, or upload it again.")


def _number(text: str | None) -> float | None:
    """The finite number that a tag holds; None for any other text."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def short_name(model: str) -> str:
    """The last two parts of a path or hub id, which say what it is and not where it is.

    >>> short_name("/srv/bestiary/models/base"), short_name("stable-diffusion-v1-5/stable-diffusion-v1-5")
    ('models/base', 'stable-diffusion-v1-5/stable-diffusion-v1-5')
    """
    return "/".join(Path(model).parts[-2:])


def _words(subject: Subject) -> dict[str, str]:
    """What the page shows of a subject."""
    return {"folder": subject.folder, "name": subject.name, "chinese": subject.chinese}
