"""What a picture was made with, written into its PNG so that the picture can be drawn again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bestiary import __version__
from bestiary.errors import BestiaryError
from bestiary.samplers import MAX_ADAPTERS, SAMPLERS, Sampling, StoredSampling, denoising_steps, from_stored, to_stored

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "bestiary"
LORA_NAME = "bestiary"  # by which A1111 finds the adapter: `adapter convert --to kohya` writes it into the file
LORA_TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)  # how prompts of A1111 name an adapter
MAX_SEED = 2**64


@dataclass(frozen=True)
class Colours:
    """Factors that a finished picture is adjusted by; 1.0 leaves it as it was drawn."""

    contrast: float = 1.0
    saturation: float = 1.0
    brightness: float = 1.0


@dataclass(frozen=True)
class AppliedAdapter:
    """An adapter as it was applied: its name, the SHA-256 of its file, and its weight."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    adapter: str
    adapter_sha256: str
    weight: float


@dataclass(frozen=True)
class StartImage:
    """The image that a picture starts from, by the SHA-256 of its file, and A1111's denoising strength.

    With a denoising strength of 1, nearly nothing of the image is left; near 0, nearly everything.
    """

    image_sha256: str
    denoise: float


@dataclass(frozen=True)
class PictureSettings:
    """Everything that decides a picture's pixels on one machine. The sampling names its width and height.

    The first adapter has its weight in the sampling; the others have theirs in more_adapters.
    """

    prompt: str
    seed: int
    sampling: Sampling
    base: str
    base_revision: str | None
    adapter: str | None
    adapter_sha256: str | None
    colours: Colours = Colours()
    more_adapters: tuple[AppliedAdapter, ...] = ()
    start: StartImage | None = None  # None: noise
    engine: str = "torch"  # or OpenVINO with the precision of the export, such as openvino-int8
    export_sha256: str | None = None  # of the export that drew it
    a1111_prompt: bool = False  # both prompts are read by A1111's rules: with emphasis, and in chunks of 75 tokens

    @property
    def drawn_steps(self) -> int:
        """How many steps drawing takes: fewer than the sampling's if it starts from an image."""
        return denoising_steps(self.sampling.steps, self.start.denoise) if self.start else self.sampling.steps

    @property
    def adapters(self) -> tuple[AppliedAdapter, ...]:
        """Every adapter, in the order in which they were applied."""
        if self.adapter is None or self.adapter_sha256 is None:
            return ()
        first = AppliedAdapter(self.adapter, self.adapter_sha256, self.sampling.adapter_weight)
        return first, *self.more_adapters

    def to_dict(self) -> dict[str, object]:
        """The settings in one flat table, ready for JSON."""
        stored = to_stored(self.sampling)
        interval = stored.pop("guidance_interval")
        more = [asdict(applied) for applied in self.more_adapters]
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            **stored,
            "base": self.base,
            "base_revision": self.base_revision,
            "adapter": self.adapter,
            "adapter_sha256": self.adapter_sha256,
            **asdict(self.colours),
            "guidance_interval": interval,  # last, as in the first files, so that a redrawn picture has the same bytes
            **({"more_adapters": more} if more else {}),
            **(asdict(self.start) if self.start else {}),
            **({"a1111_prompt": True} if self.a1111_prompt else {}),
            **({"engine": self.engine, "export_sha256": self.export_sha256} if self.export_sha256 else {}),
        }


def write_png(image: Image, settings: PictureSettings) -> bytes:
    """The picture with its colours adjusted, as a PNG with its settings: in A1111's text form and as our own JSON."""
    from PIL.PngImagePlugin import PngInfo

    metadata = PngInfo()
    metadata.add_text("parameters", as_a1111(settings))
    metadata.add_text(KEY, json.dumps(settings.to_dict(), ensure_ascii=False))
    buffer = BytesIO()
    adjusted(image, settings.colours).save(buffer, "PNG", pnginfo=metadata)
    return buffer.getvalue()


def adjusted(image: Image, colours: Colours) -> Image:
    """The picture with its colours adjusted."""
    from PIL.ImageEnhance import Brightness, Color, Contrast

    for enhance, factor in (
        (Contrast, colours.contrast),
        (Color, colours.saturation),
        (Brightness, colours.brightness),
    ):
        if factor != 1.0:
            image = enhance(image).enhance(factor)
    return image


def as_a1111(settings: PictureSettings) -> str:
    """The settings in the text form that A1111 writes into its pictures and many tools read."""
    sampling = settings.sampling
    interval = sampling.guidance_interval
    named = _lora_names(settings.adapters)
    hashes = [f"{name}: {applied.adapter_sha256[:12]}" for name, applied in named.items()]
    fields = {
        "Steps": sampling.steps,
        "Sampler": SAMPLERS[sampling.sampler].label,
        "CFG scale": f"{sampling.guidance_scale:g}",
        **({"CFG interval": "{:g} to {:g}".format(*interval)} if interval else {}),
        "Seed": settings.seed,
        "Size": f"{sampling.width}x{sampling.height}",
        "Model": Path(settings.base).name,
        **{
            f"Adapter {number}" if number > 1 else "Adapter": json.dumps(applied.adapter, ensure_ascii=False)
            for number, applied in enumerate(settings.adapters, 1)
        },
        **({"Denoising strength": f"{settings.start.denoise:g}"} if settings.start else {}),
        **({"Lora hashes": f'"{", ".join(hashes)}"'} if hashes else {}),
        **({"Engine": settings.engine} if settings.engine != "torch" else {}),
        **({"Decoder": sampling.decoder} if sampling.decoder != "full" else {}),
        "Version": f"Bestiary {__version__}",
    }
    negative = [f"Negative prompt: {sampling.negative_prompt}"] if sampling.negative_prompt else []
    is_plain = [applied.weight for applied in named.values()] == [1.0]  # as in the first files
    tags = "" if is_plain else "".join(f" <lora:{name}:{applied.weight:g}>" for name, applied in named.items())
    return "\n".join(
        [f"{settings.prompt}{tags}", *negative, ", ".join(f"{key}: {value}" for key, value in fields.items())]
    )


def _lora_names(adapters: Sequence[AppliedAdapter]) -> dict[str, AppliedAdapter]:
    """The adapters by names that A1111's `<lora:name:weight>` can hold, each of them once."""
    if len(adapters) == 1:
        return {LORA_NAME: adapters[0]}
    names: dict[str, AppliedAdapter] = {}
    for number, applied in enumerate(adapters, 1):
        name = lora_name(applied.adapter)
        names[f"{name}-{number}" if name in names else name] = applied
    return names


def lora_name(adapter: str) -> str:
    """A name for an adapter that A1111's `<lora:name:weight>` can hold.

    >>> lora_name("models:/bestiary/3"), lora_name("models/stripes.safetensors")
    ('bestiary-3', 'stripes')
    """
    version = adapter.removeprefix("models:/")
    stem = version if version != adapter else Path(adapter).name.removesuffix(".safetensors")
    return re.sub(r"[^\w.-]+", "-", stem).strip("-") or LORA_NAME


def read_settings(path: Path) -> PictureSettings:
    """Read the settings from a picture that `write_png` wrote.

    Raises BestiaryError when the file is not a picture, carries no settings, or carries some that cannot be drawn.
    """
    from pydantic import TypeAdapter

    from bestiary.image_files import UnreadableImageError, open_image

    try:
        with open_image(path, formats=("PNG", "JPEG", "WEBP")) as image:
            image.load()
            text = image.info[KEY]
        _StoredSettings(**json.loads(text))  # refuses keys that it does not know
        stored = TypeAdapter(_StoredSettings).validate_json(text, strict=True)
    except UnreadableImageError as error:
        raise BestiaryError(
            f"{path} is not a readable PNG, JPEG or WebP picture: {error.reason}. "
            "Name a PNG exactly as Bestiary wrote it."
        ) from None
    except (OSError, SyntaxError):
        raise BestiaryError(f"{path} is not a readable picture. Name a PNG exactly as Bestiary wrote it.") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise BestiaryError(f"{path} contains no settings. Name a PNG exactly as Bestiary wrote it.") from None
    settings = stored.settings()
    if (stored.image_sha256 is None) is not (stored.denoise is None) or not _can_be_drawn(settings):
        raise BestiaryError(f"{path} carries settings that cannot be drawn.")
    return settings


@dataclass(frozen=True)
class _StoredSettings(StoredSampling):
    """The flat table in the file. Fields with defaults were added after the first files had been written."""

    prompt: str = field(kw_only=True)
    seed: int = field(kw_only=True)
    base: str = field(kw_only=True)
    base_revision: str | None = field(kw_only=True)
    adapter: str | None = field(kw_only=True)
    adapter_sha256: str | None = field(kw_only=True)
    contrast: float = 1.0
    saturation: float = 1.0
    brightness: float = 1.0
    more_adapters: tuple[AppliedAdapter, ...] = ()
    image_sha256: str | None = None
    denoise: float | None = None
    a1111_prompt: bool = False
    engine: str = "torch"
    export_sha256: str | None = None

    def settings(self) -> PictureSettings:
        return PictureSettings(
            prompt=self.prompt,
            seed=self.seed,
            sampling=from_stored(self),
            base=self.base,
            base_revision=self.base_revision,
            adapter=self.adapter,
            adapter_sha256=self.adapter_sha256,
            colours=Colours(self.contrast, self.saturation, self.brightness),
            more_adapters=self.more_adapters,
            a1111_prompt=self.a1111_prompt,
            engine=self.engine,
            export_sha256=self.export_sha256,
            start=None
            if self.image_sha256 is None or self.denoise is None
            else StartImage(self.image_sha256, self.denoise),
        )


def _can_be_drawn(settings: PictureSettings) -> bool:
    sampling = settings.sampling
    return (
        sampling.is_possible
        and sampling.width is not None
        and sampling.height is not None
        and 0 <= settings.seed < MAX_SEED
        and len(settings.more_adapters) < MAX_ADAPTERS
        and (settings.adapter_sha256 is not None or not settings.more_adapters)
        and all(0 <= applied.weight < math.inf for applied in settings.more_adapters)
        and (settings.engine == "torch") == (settings.export_sha256 is None)
        and (settings.start is None or 0 < settings.start.denoise <= 1)
        and all(0.1 <= colour <= 3 for colour in asdict(settings.colours).values())
    )
