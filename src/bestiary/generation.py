"""From a request to a finished picture: choose the base, load it, apply the adapter, draw, write a PNG.

The command line and the page both draw through this module.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bestiary.errors import BestiaryError, shown
from bestiary.files import is_file, is_folder, project_root, write_new
from bestiary.png_metadata import LORA_TAG, AppliedAdapter, PictureSettings, StartImage, write_png
from bestiary.registry.resolving import check_base, find_base, locate_base, locate_known_base, needs_mlflow, resolve
from bestiary.samplers import DEFAULT_DENOISE, MAX_ADAPTER_WEIGHT, MAX_ADAPTERS

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from bestiary.diffusion.adapter import Applied
    from bestiary.diffusion.containment import Named
    from bestiary.diffusion.sampling import Progress
    from bestiary.registry.resolving import Adapter, Obstacle
    from bestiary.samplers import Decoder, DrawingDefaults, Sampling

MAX_STEM = 60  # characters of a file name


@dataclass(frozen=True)
class Base:
    """A base: a folder or an id on the Hugging Face hub, and the hub's revision."""

    model: str
    revision: str | None = None


@dataclass(frozen=True)
class Weighted:
    """An adapter as a user names it, and the weight to apply it with; None: as it was evaluated, or else 1."""

    what: str
    weight: float | None = None

    @staticmethod
    def parse(text: str) -> Weighted:
        """Read WHAT or WHAT:WEIGHT. A path with colons that exists has no weight.

        >>> Weighted.parse("models:/bestiary@champion:0.8"), Weighted.parse("models:/bestiary/3").weight
        (Weighted(what='models:/bestiary@champion', weight=0.8), None)

        Raises BestiaryError when the weight is not a number from 0 to 2, or is one for no adapter.
        """
        what, colon, ending = text.rpartition(":")
        if not colon or what == "models" or is_file(text) or is_folder(text):
            return Weighted(text)
        try:
            weight = float(ending)
        except ValueError:
            if not (what.startswith("models:/") or what == "none" or is_file(what) or is_folder(what)):
                return Weighted(text)
            weight = math.nan
        if not 0 <= weight <= MAX_ADAPTER_WEIGHT:
            raise BestiaryError(
                f"The weight {shown(ending)} of {shown(what, 200)} is not a number from 0 to {MAX_ADAPTER_WEIGHT}. "
                f"Write for example {shown(what, 200)}:0.8"
            )
        if what == "none":
            raise BestiaryError("'none' is no adapter, so it has no weight. Write --adapter none.")
        return Weighted(what, weight)


@contextmanager
def resolving(what: str, *, fast: Obstacle | None = None) -> Iterator[Callable[[], Adapter | None]]:
    """Find the adapter that `what` names; "none" is no adapter. With `fast`, also find its accepted export.

    Yields a function that waits for the result. If MLflow is needed, a second process asks it, because importing MLflow
    takes as long as importing torch, which the caller can do meanwhile. The function raises what `resolve` raises.
    """
    if what == "none":
        yield lambda: None
    elif not needs_mlflow(what):
        adapter = resolve(what, fast=fast)
        yield lambda: adapter
    else:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        with ProcessPoolExecutor(1, get_context("spawn"), _ignore_interrupts) as pool:
            yield pool.submit(resolve, what, fast=fast).result


@contextmanager
def resolving_all(named: Sequence[str], *, fast: Obstacle | None = None) -> Iterator[Callable[[], list[Adapter]]]:
    """Find the adapters of these names, as `resolving` does it; "none" alone is no adapter.

    Raises BestiaryError for "none" beside an adapter, and for too many.
    """
    if len(named) > MAX_ADAPTERS:
        raise BestiaryError(f"{len(named)} adapters are too many at once. Name at most {MAX_ADAPTERS}.")
    if len(named) > 1 and "none" in named:
        raise BestiaryError("none stands for no adapter, so it cannot be combined with one. Leave it out.")
    with ExitStack() as stack:
        found = [stack.enter_context(resolving(what, fast=fast)) for what in named]
        yield lambda: [adapter for wait in found if (adapter := wait()) is not None]


def weight_of(adapter: Adapter, named: Weighted) -> float:
    """The weight that the user gave, else the one that the adapter was evaluated with, else 1."""
    if named.weight is not None:
        return named.weight
    return adapter.defaults.sampling.adapter_weight if adapter.defaults else 1.0


class Evaluated(Protocol):
    """An adapter, or the offer of one, that may say how to draw with it."""

    @property
    def defaults(self) -> DrawingDefaults | None: ...

    @property
    def few_step(self) -> bool: ...


def defaults_of(adapters: Sequence[Evaluated], weights: Sequence[float] = ()) -> DrawingDefaults | None:
    """How to draw with these adapters: as the first one was evaluated, in the few steps of one that was made for them.

    A few-step adapter whose weight is 0 changes nothing, so it is ignored. None when the others do not say.
    """
    idle = {index for index, weight in enumerate(weights) if weight == 0}
    adapters = [adapter for index, adapter in enumerate(adapters) if not (adapter.few_step and index in idle)]
    first = adapters[0].defaults if adapters else None
    few_step = next((adapter.defaults for adapter in adapters if adapter.few_step and adapter.defaults), None)
    if first is None or few_step is None:
        return few_step or first
    return replace(first, sampling=first.sampling.in_steps_of(few_step.sampling))


def decisive(adapters: Sequence[Adapter]) -> Adapter | None:
    """The adapter that chooses the base: the first that names one, else the first."""
    return next((adapter for adapter in adapters if adapter.base), adapters[0] if adapters else None)


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent process."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def named_base(model: str | None) -> Base | None:
    """The base that a user named, looked for in the project's folder too; None for no name."""
    return located_base(model, None) if model else None


def located_base(model: str, revision: str | None) -> Base:
    """A base by the name that settings or parameters hold, looked for in the project's folder too."""
    return Base(locate_base(model), revision)


def no_base_error() -> BestiaryError:
    """The error for a command that has no base to draw with."""
    return BestiaryError(
        "There is no params.yaml here that names a base. Run this in the project's folder, or use --base."
    )


def choose_base(
    adapter: Adapter | None,
    chosen: Base | None,
    default: Base | None,
    *,
    trusted: bool = True,
    known: Collection[Base] = (),
) -> Base:
    """The base to draw with: the one that the user chose, else the one that the adapter names, else the default.

    Set `trusted` to False for a stranger's adapter: the base that it names is then ignored. A base on the hub that an
    adapter names is used only if it is the default or one of the `known` ones. An export contains its base.

    Raises BestiaryError when there is no base to draw with.
    """
    if adapter is not None and adapter.is_export:
        return Base(adapter.base or "", adapter.base_revision)
    if chosen is not None:
        its_own = adapter is not None and chosen.model == adapter.base and chosen.revision is None
        return Base(chosen.model, adapter.base_revision) if adapter and its_own else chosen
    if adapter is None:
        if default is None:
            raise no_base_error()
        return default
    if default is not None and (adapter.base is None or not trusted):
        return default
    return Base(find_base(adapter, None, _models(default, known)), adapter.base_revision)


def base_of_picture(settings: PictureSettings, picture: Path, default: Base | None) -> Base:
    """The base that a picture was drawn with. If an export drew it, the export contains that base.

    Raises BestiaryError when it is on the hub and not the default.
    """
    if settings.export_sha256:
        return Base(settings.base, settings.base_revision)
    return Base(locate_known_base(settings.base, str(picture), _models(default)), settings.base_revision)


def overrides_base(chosen: Base | None, adapter: Adapter | None) -> bool:
    """Whether the user chose the base, so that the adapter is drawn on it even if it was trained on another one.

    Naming the adapter's own base on the hub only allows its download.
    """
    its_own = chosen is not None and adapter is not None and chosen.model == adapter.base
    return chosen is not None and (not its_own or is_folder(chosen.model) or is_file(chosen.model))


def _models(default: Base | None, known: Collection[Base] = ()) -> set[str]:
    return {base.model for base in (default, *known) if base is not None}


@dataclass(frozen=True)
class Export:
    """A loaded export: the SHA-256 of its manifest, which covers all of its files, and what PNGs record of it."""

    sha256: str
    adapter_sha256: str
    engine: str  # with the precision, such as openvino-int8
    decoder: Decoder

    @staticmethod
    def of(folder: Path) -> Export:
        """Read it from the manifest in the folder."""
        from bestiary.diffusion.export_format import MANIFEST, file_sha256, read_manifest

        manifest = read_manifest(folder)
        engine = f"{manifest.engine}-{manifest.precision}"
        return Export(file_sha256(folder / MANIFEST), manifest.adapter_sha256, engine, manifest.decoder)


class Generator:
    """Draws with one base in memory and any adapters on it, or with an export. They stay loaded for the next picture.

    `tiny_decoder` names a tiny decoder for the base. It is loaded when the sampling of a picture asks for it.
    """

    def __init__(self, tiny_decoder: Base | None = None) -> None:
        self._tiny_decoder = tiny_decoder
        self._base: Base | None = None
        self.export: Export | None = None  # the loaded export, if an export draws
        self.device = ""
        self.adapter_hashes: tuple[str, ...] = ()  # SHA-256 of the applied adapters, in their order
        self._named: tuple[Named, ...] = ()  # the same adapters if they are several, and which ones they contain
        self.applied: tuple[Applied, ...] = ()  # what the base took of each
        self._pipeline: StableDiffusionPipeline | None = None
        self._hashed: tuple[Base, str] | None = None  # a base and its SHA-256
        self._applied: list[tuple[Path, list[int]]] = []  # each adapter's file and when it was changed

    @property
    def pipeline(self) -> StableDiffusionPipeline:
        """The loaded pipeline."""
        assert self._pipeline is not None, "call prepare first"
        return self._pipeline

    @property
    def base(self) -> Base:
        """The loaded base."""
        assert self._base is not None, "call prepare first"
        return self._base

    def is_loaded(self, base: Base, device: str) -> bool:
        """Whether this base is in memory on this device."""
        return self._pipeline is not None and self.export is None and (self._base, self.device) == (base, device)

    def has_open(self, adapters: Sequence[Adapter]) -> bool:
        """Whether the first of these adapters is an export that is in memory."""
        export = adapters[0].export if adapters and adapters[0].is_export else None
        return export is not None and self.export == Export.of(export)

    def prepare(self, base: Base, adapters: Sequence[Adapter], device: str = "", *, any_base: bool = False) -> None:
        """Load `base` on `device` (empty: the best one) and apply `adapters`, in place of what was there.

        Raises BestiaryError when the base cannot be loaded, when an adapter does not fit it or is given twice, or when
        one was trained on another base, unless `any_base`. An export replaces base and adapter.
        """
        from bestiary.diffusion.adapter import adapter_sha256

        if adapters and adapters[0].is_export:
            self.open_export(adapters[0])
            return
        versions = [_version(adapter) for adapter in adapters]
        if not (self.is_loaded(base, device) and self._applied == versions):
            hashes = tuple(adapter_sha256(adapter.file) for adapter in adapters)
            named = _named(adapters, hashes)
            for adapter in adapters:
                if adapter.base_sha256 and not any_base:
                    check_base(adapter, base.model, self._hash(base))
            self._load(base, device)
            self._apply(adapters, versions)
            self.adapter_hashes, self._named = hashes, named

    def open_export(self, adapter: Adapter) -> None:
        """Load an export, which contains its base, unless it is in memory. Raises what `engines.open_export` does."""
        from bestiary.diffusion.engines import open_export

        assert adapter.export is not None
        export = Export.of(adapter.export)
        if self.export == export:
            return
        self._pipeline, self._applied, self.applied = None, [], ()  # frees the memory first
        self.export = None
        self._pipeline = open_export(adapter.export)
        self._base = choose_base(adapter, None, None)
        self.device, self.export = "cpu", export
        self.adapter_hashes = (export.adapter_sha256,)

    def _hash(self, base: Base) -> str:
        """The base's SHA-256. Hashing a large base takes seconds, so the last one is kept."""
        from bestiary.diffusion.base import base_sha256

        if self._hashed is None or self._hashed[0] != base:
            self._hashed = base, base_sha256(base.model, base.revision)
        return self._hashed[1]

    def _load(self, base: Base, device: str) -> None:
        from bestiary.diffusion.base import load_pipeline

        if self.is_loaded(base, device):
            return
        self._pipeline, self._applied, self.adapter_hashes = None, [], ()  # frees the memory first
        self.export = None
        if self._base != base:
            self._hashed = self._hashed if self._hashed and self._hashed[0] == base else None
        self._pipeline = load_pipeline(base.model, base.revision, device=device or None)
        self._base, self.device = base, device

    def _apply(self, adapters: Sequence[Adapter], versions: list[tuple[Path, list[int]]]) -> None:
        from bestiary.diffusion.adapter import apply_adapters

        self._applied, self.adapter_hashes, self.applied, self._named = [], (), (), ()
        applied = apply_adapters(self.pipeline, [adapter.file for adapter in adapters], [1.0] * len(adapters))
        self._applied, self.applied = versions, tuple(applied)

    def applied_files(self, adapters: Sequence[Adapter]) -> list[str]:
        """What the base took of each adapter that is a file, in words. A registered version was verified before.

        For an export, the line names its engine and its decoder.
        """
        if self.export:
            (adapter,) = adapters
            return [f"{adapter.uri}: drawing with {self.export.engine} and the {self.export.decoder} decoder."]
        return [
            f"{adapter.uri}: {applied}."
            for adapter, applied in zip(adapters, self.applied, strict=True)
            if not adapter.uri.startswith("models:")
        ]

    def sized(self, sampling: Sampling) -> Sampling:
        """The sampling with its width and height in pixels: the base's own where none were asked for."""
        from bestiary.diffusion.sampling import base_side

        side = base_side(self.pipeline)
        return replace(sampling, width=sampling.width or side, height=sampling.height or side)

    def prompted(self, settings: PictureSettings, prompt: str, *, literal: bool = False) -> PictureSettings:
        """The settings with this prompt, read by A1111's rules if it or the negative prompt needs them.

        Brackets in a `literal` prompt are no emphasis. Raises BestiaryError for A1111's <lora:...>, which would be
        drawn as words.
        """
        from bestiary.diffusion.prompts import escaped, is_long, needs_rules

        if found := LORA_TAG.search(f"{prompt}\n{settings.sampling.negative_prompt}"):
            raise BestiaryError(
                f"{shown(found[0])} in a prompt chooses no adapter here. Take it out, and choose the adapter itself: "
                "with --adapter, in the page's list, or as a program's model."
            )
        tokenizer = self.pipeline.tokenizer
        by_rules = is_long(tokenizer, prompt) if literal else needs_rules(tokenizer, prompt)
        by_rules = by_rules or needs_rules(tokenizer, settings.sampling.negative_prompt)
        prompt = escaped(prompt) if literal and by_rules else prompt
        return replace(settings, prompt=prompt, a1111_prompt=by_rules)

    def draw(self, settings: PictureSettings, progress: Progress | None = None, image: Image | None = None) -> Image:
        """Draw the picture that `settings` describe, without the applied adapters if they name none.

        `image` is the one that the settings start from. Raises BestiaryError when this base cannot draw the picture,
        when an adapter contains another one and neither has the weight 0, or when there is no such image; whatever
        `progress` raises stops the drawing.
        """
        from bestiary.diffusion.adapter import set_weights
        from bestiary.diffusion.containment import check_counted_once
        from bestiary.diffusion.sampling import Start, generate

        if settings.start is not None and image is None:
            raise BestiaryError("This picture starts from an image. Give the image with --image.")
        weights = [applied.weight for applied in settings.adapters]
        if self.export is None:
            pairs = zip(self._named, weights, strict=False)  # none: one adapter, or the base alone
            check_counted_once([named for named, weight in pairs if weight])
            set_weights(self.pipeline, weights or [0.0] * len(self._applied))
            self._add_tiny_decoder(settings.sampling)
        elif weights != [1.0]:
            raise BestiaryError(
                "An export has its adapter fused at one weight, so it cannot draw with another. Use --engine torch."
            )
        (drawn,) = generate(
            self.pipeline,
            [settings.prompt],
            [settings.seed],
            settings.sampling,
            batch_size=1,  # a larger batch would change the last bits of a picture
            progress=progress,
            a1111_prompts=settings.a1111_prompt,
            start=Start(image, settings.start.denoise) if settings.start and image else None,
        )
        return drawn

    def _add_tiny_decoder(self, sampling: Sampling) -> None:
        """Load the tiny decoder if the sampling asks for it and the pipeline has none yet."""
        from bestiary.diffusion.decoders import add_tiny_decoder, has_tiny_decoder, load_tiny_decoder

        if sampling.decoder == "tiny" and self._tiny_decoder and not has_tiny_decoder(self.pipeline):
            decoder = load_tiny_decoder(self._tiny_decoder.model, self._tiny_decoder.revision, self.pipeline)
            add_tiny_decoder(self.pipeline, decoder)


def _named(adapters: Sequence[Adapter], hashes: Sequence[str]) -> tuple[Named, ...]:
    """The adapters by the hashes that tell whether one would count twice; nothing for a single one.

    Raises BestiaryError when one of them is given twice.
    """
    from bestiary.diffusion.adapter_reading import read_adapter
    from bestiary.diffusion.containment import Named, check_given_once

    if len(adapters) < 2:
        return ()
    pairs = zip(adapters, hashes, strict=True)
    named = tuple(Named.of(adapter.uri, sha256, read_adapter(adapter.file)) for adapter, sha256 in pairs)
    check_given_once(named)
    return named


def _version(adapter: Adapter) -> tuple[Path, list[int]]:
    """What tells two adapters apart without reading them: the file and when it, or the config beside it, changed."""
    from bestiary.diffusion.stored_adapter import deciding_files

    return adapter.file, [file.stat().st_mtime_ns for file in deciding_files(adapter.file)]


def save_picture(image: Image, settings: PictureSettings, folder: Path, name: str) -> Path:
    """Write the picture with its settings to `folder`/`name`.png, numbered if another picture has that name.

    Raises BestiaryError when it cannot be written.
    """
    return save_png(write_png(image, settings), folder, name)


def save_png(data: bytes, folder: Path, name: str) -> Path:
    """Write a PNG to `folder`/`name`.png, numbered if another picture has that name.

    Raises BestiaryError when it cannot be written.
    """
    path, number = folder / f"{name}.png", 1
    # Another process may draw into the same folder, so the name is taken by writing.
    while not write_new(path, data) and not (path.is_file() and path.read_bytes() == data):
        number += 1
        path = folder / f"{name}-{number}.png"
    return path


def check_same_adapters(
    adapters: Sequence[Adapter], original: PictureSettings, like: Path, named: Sequence[str]
) -> None:
    """Raise BestiaryError when these are not the adapters or the export that the picture `like` was drawn with."""
    from bestiary.diffusion.adapter import adapter_sha256

    exports = [Export.of(adapter.export) for adapter in adapters if adapter.is_export and adapter.export]
    made_with = [applied.adapter_sha256 for applied in original.adapters]
    if exports or original.export_sha256:
        if [export.sha256 for export in exports] != [original.export_sha256]:
            raise BestiaryError(
                f"{like} was not drawn with the export that {', '.join(named)} names. Name the right export with "
                "--adapter."
            )
    elif [adapter_sha256(adapter.file) for adapter in adapters] != made_with:
        raise BestiaryError(
            f"{like} was made with another adapter than {', '.join(named)}. Name the right one with --adapter; several "
            "in the order in which the picture names them."
        )


def common_settings(
    generator: Generator, adapters: Sequence[Adapter], weighted: Sequence[Weighted], sampling: Sampling
) -> PictureSettings:
    """What the pictures of one command have in common; their prompts and seeds differ."""
    applied = [
        AppliedAdapter(adapter.uri, sha256, weight_of(adapter, each))
        for adapter, sha256, each in zip(adapters, generator.adapter_hashes, weighted, strict=False)  # none: no adapter
    ]
    return PictureSettings(
        prompt="",
        seed=0,
        sampling=sampling,
        base=portable_base(generator.base.model),
        base_revision=generator.base.revision,
        adapter=applied[0].adapter if applied else None,
        adapter_sha256=applied[0].adapter_sha256 if applied else None,
        more_adapters=tuple(applied[1:]),
        engine=generator.export.engine if generator.export else "torch",
        export_sha256=generator.export.sha256 if generator.export else None,
    )


def start_image(
    path: Path | None, denoise: float | None, original: PictureSettings | None
) -> tuple[StartImage | None, Image | None]:
    """The image to start from, if any.

    Raises BestiaryError when it is not the one that the `original` picture started from, or cannot be read.
    """
    known = original.start if original else None
    if path is None:
        if known:
            raise BestiaryError(
                f"The picture started from an image with the SHA-256 {shown(known.image_sha256, 12)}. Give that image "
                "with --image."
            )
        return None, None
    found, image = read_start_image(path, known.denoise if known else denoise or DEFAULT_DENOISE)
    if original and found != known:
        reason = "is not the image that the picture started from" if known else "is not used: the picture has no image"
        raise BestiaryError(f"--image {path} {reason}. Give the right one, or leave it out.")
    return found, image


def read_start_image(path: Path, denoise: float, content: bytes | None = None) -> tuple[StartImage, Image]:
    """The image at `path` to start a picture from, or in its `content` if that is known, as upright RGB.

    Raises BestiaryError when it cannot be read.
    """
    from bestiary.data.images import decode
    from bestiary.image_files import read_image

    content = read_image(path) if content is None else content
    return StartImage(hashlib.sha256(content).hexdigest(), denoise), decode(path, content).image


def file_stem(name: str) -> str:
    """A file name that every file system accepts: letters and digits of any script, joined by hyphens.

    >>> file_stem("Red Panda / 1"), file_stem("老虎"), file_stem("..")
    ('red-panda-1', '老虎', 'picture')
    """
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")[:MAX_STEM] or "picture"


def portable_base(model: str) -> str:
    """A base's name that means the same in another clone: a folder of the project by its path from the root."""
    root = project_root().resolve()
    folder = Path(model)
    inside = (is_folder(folder) or is_file(folder)) and folder.is_relative_to(root)
    return f"./{folder.relative_to(root).as_posix()}" if inside else model
