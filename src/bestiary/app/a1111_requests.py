"""What A1111's clients send to txt2img and img2img: fields that Bestiary uses, and fields that must have their default.

A field that would change the picture in A1111 but has no effect here is refused, never ignored.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bestiary.app.errors import InvalidError
from bestiary.errors import short, shown
from bestiary.png_metadata import LORA_TAG
from bestiary.samplers import MAX_ADAPTER_WEIGHT, SAMPLERS, SamplingChanges

ANYTHING: tuple[object, ...] = ()
NOTHING = (None, False, 0, "", "None", -1)
# The other fields of A1111's txt2img, with the values that have no effect. ANYTHING: no value has an effect.
USUAL: Mapping[str, tuple[object, ...]] = {
    "alwayson_scripts": (None, {}),
    "comments": ANYTHING,
    "denoising_strength": ANYTHING,  # of the second pass, which enable_hr turns on
    "disable_extra_networks": NOTHING,
    "do_not_save_grid": ANYTHING,
    "do_not_save_samples": ANYTHING,
    "enable_hr": NOTHING,
    "eta": (None, 0, 1),
    "firstpass_image": NOTHING,
    "firstphase_height": NOTHING,
    "firstphase_width": NOTHING,
    "force_task_id": ANYTHING,
    "infotext": NOTHING,
    "override_settings_restore_afterwards": ANYTHING,
    "refiner_checkpoint": NOTHING,
    "refiner_switch_at": ANYTHING,
    "restore_faces": NOTHING,
    "s_churn": NOTHING,
    "s_min_uncond": NOTHING,
    "s_noise": (None, 0, 1),
    "s_tmax": NOTHING,
    "s_tmin": NOTHING,
    "save_images": NOTHING,
    "script_args": ANYTHING,
    "script_name": NOTHING,
    "seed_resize_from_h": NOTHING,
    "seed_resize_from_w": NOTHING,
    "send_images": (None, True),
    "styles": (None, []),
    "subseed": ANYTHING,
    "subseed_strength": NOTHING,
    "tiling": NOTHING,
}
# The additional fields of img2img. Inpainting fields have no effect, because masks are refused.
USUAL_IMG2IMG: Mapping[str, tuple[object, ...]] = {
    **USUAL,
    "image_cfg_scale": ANYTHING,  # only for bases that edit images by instruction
    "include_init_images": ANYTHING,  # the answer never repeats the image
    "initial_noise_multiplier": (None, 1),
    "inpaint_full_res": ANYTHING,
    "inpaint_full_res_padding": ANYTHING,
    "inpainting_fill": ANYTHING,
    "inpainting_mask_invert": ANYTHING,
    "latent_mask": NOTHING,
    "mask": NOTHING,
    "mask_blur": ANYTHING,
    "mask_blur_x": ANYTHING,
    "mask_blur_y": ANYTHING,
    "mask_round": ANYTHING,
}
SECOND_PASS = "hr_"  # prefix of the fields of the second pass
USUAL_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "CLIP_stop_at_last_layers": (None, 1),
    "samples_format": (None, "png"),
    "sd_vae": (None, "None", "Automatic", ""),
}
CHECKPOINT = "sd_model_checkpoint"  # the option that chooses the base
OTHER_NETWORK = re.compile(r"<(hypernet|lyco):[^<>]*>", re.IGNORECASE)
# A1111's schedule types, and what each adds to a sampler's label. Our samplers without an addition are uniform.
SCHEDULES = {"Automatic": "", "Uniform": "", "Karras": " Karras", "SGM Uniform": " SGM Uniform"}
# Other names of our samplers: those of k-diffusion (A1111 accepts them, too) and of ComfyUI.
OTHER_NAMES = {
    "k_euler": "euler",
    "k_euler_a": "euler-ancestral",
    "k_euler_ancestral": "euler-ancestral",
    "euler_ancestral": "euler-ancestral",
    "k_dpmpp_2m": "dpmsolver++",
    "dpmpp_2m": "dpmsolver++",
    "k_dpmpp_2m_ka": "dpmsolver++karras",
    "k_dpmpp_2m_sde_ka": "dpmsolver++sde",
    "uni_pc": "unipc",
}


class Txt2ImgRequest(BaseModel):
    """The fields of A1111's txt2img that decide the picture. Their default is the adapter's evaluation."""

    model_config = ConfigDict(extra="allow", frozen=True)

    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = Field(default=None, ge=-1, lt=2**53)
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int | None = Field(default=None, ge=1, le=16)
    n_iter: int | None = Field(default=None, ge=1, le=16)
    sampler_name: str | None = None
    sampler_index: str | None = None  # an older name for sampler_name
    scheduler: str | None = None
    override_settings: dict[str, Any] | None = None  # A1111's options, which `checkpoint` and `check` read

    @property
    def count(self) -> int:
        """The number of requested pictures."""
        return (self.batch_size or 1) * (self.n_iter or 1)

    @property
    def checkpoint(self) -> str | None:
        """The requested base; None when the request names none."""
        wanted = (self.override_settings or {}).get(CHECKPOINT)
        return None if wanted is None else str(wanted)

    @property
    def changes(self) -> SamplingChanges:
        """The requested sampling. Raises InvalidError when there is no such sampler."""
        return SamplingChanges(
            sampler=sampler_key(self.sampler_name or self.sampler_index, self.scheduler),
            steps=self.steps,
            guidance_scale=self.cfg_scale,
            width=self.width,
            height=self.height,
            negative_prompt=self.negative_prompt or None,
        )

    def check(self, usual: Mapping[str, tuple[object, ...]] = USUAL) -> None:
        """Raise InvalidError when a field asks for something that Bestiary cannot do."""
        given = self.model_extra or {}
        _check_usual({name: value for name, value in given.items() if not name.startswith(SECOND_PASS)}, usual)
        check_options(self.override_settings or {})


class Img2ImgRequest(Txt2ImgRequest):
    """The fields of A1111's img2img that decide the picture: those of txt2img, and the image to start from."""

    init_images: tuple[str, ...] = ()
    denoising_strength: float = Field(default=0.75, gt=0, le=1)
    resize_mode: Literal[0, 1] = 1  # 0 stretches the image to the picture's size, 1 crops it

    def check(self, usual: Mapping[str, tuple[object, ...]] = USUAL_IMG2IMG) -> None:
        """Raise InvalidError when a field asks for something that Bestiary cannot do."""
        given = self.model_extra or {}
        for name in ("mask", "latent_mask"):
            if given.get(name):
                raise InvalidError(
                    f"There are no masks here: the whole image is redrawn. Leave {name} out.", field=name
                )
        super().check(usual)

    def image(self) -> bytes:
        """The content of the image to start from. Raises InvalidError when there is not exactly one, in base64."""
        if len(self.init_images) != 1:
            raise InvalidError(
                f"init_images holds {len(self.init_images)} images. Send the one image to start from, in base64.",
                field="init_images",
            )
        (text,) = self.init_images
        if text.startswith("data:"):
            text = text.partition(",")[2]
        try:
            content = base64.b64decode("".join(text.split()), validate=True)
        except ValueError:
            content = b""
        if not content:
            raise InvalidError(
                "init_images[0] is not an image in base64. Encode the file's bytes; addresses are not fetched.",
                field="init_images",
            )
        return content

    def check_shape(self, image: tuple[int, int], size: tuple[int | None, int | None]) -> None:
        """Raise InvalidError when the image must be stretched to this size of the picture; None: the base's side.

        >>> Img2ImgRequest(resize_mode=0).check_shape((640, 480), (512, 384))
        """
        width, height = size[0] or size[1] or 1, size[1] or size[0] or 1
        scaled = (
            image[0] * height / image[1],
            image[1] * width / image[0],
        )  # scaled to the picture's height, or to its width
        if self.resize_mode == 0 and min(abs(scaled[0] - width), abs(scaled[1] - height)) >= 1:
            raise InvalidError(
                f"resize_mode 0 would stretch the image of {image[0]} x {image[1]} pixels. Send resize_mode 1, which "
                "crops it, or a width and a height in its proportions.",
                field="resize_mode",
            )


def check_options(options: Mapping[str, object]) -> None:
    """Raise InvalidError when an option other than the base asks for something that Bestiary cannot do."""
    _check_usual({name: value for name, value in options.items() if name != CHECKPOINT}, USUAL_OPTIONS)


def _check_usual(given: Mapping[str, object], usual: Mapping[str, tuple[object, ...]]) -> None:
    for name, value in given.items():
        if name not in usual:
            raise InvalidError(f"{shown(name)} is not known here. Leave it out.", field=name)
        if usual[name] and value not in usual[name]:
            raise InvalidError(f"{name}: {short(value)} cannot be done here. Leave it out.", field=name)


@dataclass(frozen=True)
class LoraTag:
    """An adapter that a prompt names, as `<lora:name:weight>`."""

    name: str
    weight: float


def split_prompt(prompt: str) -> tuple[str, list[LoraTag]]:
    """The prompt without its `<lora:name:weight>` tags, and the adapters that they name. The weight is optional.

    >>> split_prompt("a tiger <lora:stripes:0.8>")
    ('a tiger', [LoraTag(name='stripes', weight=0.8)])

    Raises InvalidError when a weight is not a number from 0 to 2, or when the prompt names another kind of network.
    """
    if other := OTHER_NETWORK.search(prompt):
        raise InvalidError(f"{shown(other[0])} cannot be used here, only <lora:NAME:WEIGHT>.", field="prompt")
    tags = [_tag(found) for found in LORA_TAG.finditer(prompt)]
    return " ".join(LORA_TAG.sub(" ", prompt).split()), tags


def _tag(found: re.Match[str]) -> LoraTag:
    name, _, weight = found[1].partition(":")
    try:
        number = float(weight or 1)
    except ValueError:
        number = -1.0
    if not name.strip() or not 0 <= number <= MAX_ADAPTER_WEIGHT:
        raise InvalidError(
            f"{shown(found[0])} needs a name and a weight from 0 to {MAX_ADAPTER_WEIGHT}, as in <lora:stripes:0.8>.",
            field="prompt",
        )
    return LoraTag(name.strip(), number)


def sampler_key(name: str | None, schedule: str | None) -> str | None:
    """The sampler with this name (its label, its key or another program's) and schedule type; None for no name.

    >>> sampler_key("DPM++ 2M", "Karras"), sampler_key("k_euler_a", "automatic"), sampler_key("DDIM", "SGM Uniform")
    ('dpmsolver++karras', 'euler-ancestral', 'ddim-trailing')

    Raises InvalidError when there is none.
    """
    if not name:
        return None
    by_label = {sampler.label.lower(): key for key, sampler in SAMPLERS.items()}
    wanted = name.strip().lower()
    key = OTHER_NAMES.get(wanted, wanted)
    label = SAMPLERS[key].label.lower() if key in SAMPLERS else wanted
    suffixes = {label.lower(): suffix for label, suffix in SCHEDULES.items()}
    suffix = suffixes.get((schedule or "automatic").lower().replace("_", " "))
    if suffix is not None and (found := by_label.get(f"{label.removesuffix(suffix.lower())}{suffix.lower()}")):
        return found
    labelled = ", ".join(sampler.label for sampler in SAMPLERS.values())
    schedules = f" with the schedule {shown(schedule or '')}" if schedule and suffix != "" else ""
    raise InvalidError(
        f"There is no sampler {shown(name)}{schedules} here. Choose one of {labelled}.", field="sampler_name"
    )
