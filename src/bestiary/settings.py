"""What a picture was made with: carried in its PNG, so that it can be made again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary import __version__
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "bestiary"
# The names that A1111 and ComfyUI's users know the samplers by.
SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "dpmsolver++": "DPM++ 2M",
    "dpmsolver++karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
    "euler": "Euler",
    "lcm": "LCM",
}


@dataclass(frozen=True)
class Settings:
    """All that decides a picture's pixels on one machine."""

    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    scheduler: str
    resolution: int
    base: str
    base_revision: str | None
    adapter: str | None
    adapter_sha256: str | None
    contrast: float = 1.0
    saturation: float = 1.0
    brightness: float = 1.0


def finish(image: Image, settings: Settings) -> bytes:
    """The picture with its colours set, as PNG with its settings: as A1111 writes them, and whole, to make it again."""
    from PIL.ImageEnhance import Brightness, Color, Contrast
    from PIL.PngImagePlugin import PngInfo

    for enhance, factor in (
        (Contrast, settings.contrast),
        (Color, settings.saturation),
        (Brightness, settings.brightness),
    ):
        if factor != 1.0:
            image = enhance(image).enhance(factor)
    about = PngInfo()
    about.add_text("parameters", as_a1111(settings))
    about.add_text(KEY, json.dumps(asdict(settings), ensure_ascii=False))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def as_a1111(settings: Settings) -> str:
    """The settings in the text form that A1111 writes into its pictures and many tools read."""
    fields = {
        "Steps": settings.steps,
        "Sampler": SAMPLERS[settings.scheduler],
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": settings.seed,
        "Size": f"{settings.resolution}x{settings.resolution}",
        "Model": Path(settings.base).name,
        **({"Adapter": json.dumps(settings.adapter, ensure_ascii=False)} if settings.adapter else {}),
        **({"Lora hashes": f'"bestiary: {settings.adapter_sha256[:12]}"'} if settings.adapter_sha256 else {}),
        "Version": f"Bestiary {__version__}",
    }
    return f"{settings.prompt}\n{', '.join(f'{key}: {value}' for key, value in fields.items())}"


def read_settings(path: Path) -> Settings:
    """The settings in a picture that `finish` wrote. Raises BestiaryError when there are none."""
    from PIL import Image, UnidentifiedImageError
    from pydantic import TypeAdapter

    try:
        with Image.open(path) as image:
            image.load()
            found = image.info[KEY]
        Settings(**json.loads(found))  # no setting more than there are
        return TypeAdapter(Settings).validate_json(found, strict=True)
    except FileNotFoundError:
        raise BestiaryError(f"There is no picture {path}.") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError):
        raise BestiaryError(f"{path} is no readable picture.") from None
    except (KeyError, TypeError, ValueError):
        raise BestiaryError(f"{path} does not carry the settings that it was made with.") from None
