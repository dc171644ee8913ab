"""How pictures are drawn: what is usual for an adapter, and what one picture was made with, which its PNG carries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestiary import __version__
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from PIL.Image import Image

    from bestiary.params import Evaluate

KEY = "bestiary"


@dataclass(frozen=True)
class Sampler:
    """A way from noise to a picture: its name among A1111's and ComfyUI's users, and diffusers' class and options.

    A `noisy` one adds noise on the way, so that more steps lead to another picture and not to the same more exactly.
    """

    label: str
    scheduler: str
    options: Mapping[str, Any]
    noisy: bool = False


def _dpmsolver(algorithm: str, *, karras: bool = False, order: int = 2) -> dict[str, Any]:
    return {
        "algorithm_type": algorithm,
        "use_karras_sigmas": karras,
        "solver_order": order,
        "timestep_spacing": "linspace",
    }


# clip_sample: latents are not bound to [-1, 1]. timestep_spacing: with "leading", which many bases have, diffusers
# begins 400 steps at timestep 800 and takes pure noise for what is left there. DDIM is the first order of DPM-Solver++
# (arXiv:2211.01095, section 4); diffusers' own misses the next timestep where 1000 is no multiple of the steps.
# Each sampler says all that another one, whose configuration it may be made from, says otherwise.
# Sources, in order: arXiv:2006.11239, 2010.02502, 2211.01095 for three (with the noise levels of 2206.00364 in those
# called Karras), 2302.04867, 2206.00364, 2310.04378.
SAMPLERS = {
    "ddpm": Sampler("DDPM", "DDPMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}, noisy=True),
    "ddim": Sampler("DDIM", "DPMSolverMultistepScheduler", _dpmsolver("dpmsolver++", order=1)),
    "dpmsolver++": Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", _dpmsolver("dpmsolver++")),
    "dpmsolver++karras": Sampler(
        "DPM++ 2M Karras", "DPMSolverMultistepScheduler", _dpmsolver("dpmsolver++", karras=True)
    ),
    "dpmsolver++sde": Sampler(
        "DPM++ 2M SDE Karras", "DPMSolverMultistepScheduler", _dpmsolver("sde-dpmsolver++", karras=True), noisy=True
    ),
    "unipc": Sampler(
        "UniPC",
        "UniPCMultistepScheduler",
        {"use_karras_sigmas": False, "solver_order": 2, "timestep_spacing": "linspace"},
    ),
    "euler": Sampler("Euler", "EulerDiscreteScheduler", {"use_karras_sigmas": False, "timestep_spacing": "linspace"}),
    "lcm": Sampler("LCM", "LCMScheduler", {"clip_sample": False, "timestep_spacing": "leading"}, noisy=True),
}


@dataclass(frozen=True)
class Usual:
    """How pictures are drawn unless somebody says otherwise: an adapter's as it was evaluated, its operating point."""

    template: str = "a photo of {}"
    steps: int = 25
    guidance_scale: float = 7.5
    guidance_interval: tuple[float, float] | None = None  # noise levels: above the first, up to the second; None: all
    scheduler: str = "dpmsolver++"
    resolution: int | None = None  # pixels a side; None: the base's

    @staticmethod
    def of(evaluate: Evaluate) -> Usual:
        """How an evaluation draws."""
        low_high = evaluate.guidance_interval
        return Usual(
            template=evaluate.template,
            steps=evaluate.steps,
            guidance_scale=evaluate.guidance_scale,
            guidance_interval=(low_high[0], low_high[1]) if low_high else None,
            scheduler=evaluate.scheduler,
        )

    def to_json(self) -> str:
        """It as text, for `from_json`."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Usual:
        """What `to_json` wrote. Raises ValueError when it is something else."""
        from pydantic import TypeAdapter

        usual = TypeAdapter(Usual).validate_json(text, strict=True)
        if usual.scheduler not in SAMPLERS or "{}" not in usual.template:
            raise ValueError(text)
        return usual


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
    guidance_interval: tuple[float, float] | None = None


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
        "Sampler": SAMPLERS[settings.scheduler].label,
        "CFG scale": f"{settings.guidance_scale:g}",
        **({"CFG interval": "{:g} to {:g}".format(*settings.guidance_interval)} if settings.guidance_interval else {}),
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
        settings = TypeAdapter(Settings).validate_json(found, strict=True)
    except FileNotFoundError:
        raise BestiaryError(f"There is no picture {path}.") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError):
        raise BestiaryError(f"{path} is no readable picture.") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise BestiaryError(f"{path} does not carry the settings that it was made with.") from None
    if not _can_be_drawn(settings):
        raise BestiaryError(f"{path} carries settings that cannot be drawn.")
    return settings


def _can_be_drawn(settings: Settings) -> bool:
    low, high = settings.guidance_interval or (0.0, 1.0)
    colours = (settings.contrast, settings.saturation, settings.brightness)
    return (
        1 <= settings.steps <= 1000
        and 8 <= settings.resolution <= 4096
        and 0 <= settings.seed < 2**64
        and 1 <= settings.guidance_scale <= 50
        and 0 <= low < high < math.inf
        and all(0.1 <= colour <= 3 for colour in colours)
        and settings.scheduler in SAMPLERS
    )
