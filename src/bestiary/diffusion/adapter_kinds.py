"""What else a file may be than an adapter for Stable Diffusion, told by the names and sizes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

# The width of the text features that the cross attention reads tells the families apart.
FAMILIES_BY_TEXT_WIDTH = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "SDXL's refiner",
    2048: "SDXL",
}
FAMILIES_BY_NAME = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "FLUX"),
    (r"joint_blocks|lora_te3_|text_encoder_3\.", "Stable Diffusion 3"),
    (
        r"^(base_model\.model\.)?transformer\.|^diffusion_model\.(layers|blocks)|^lora_transformer_",
        "a diffusion transformer",
    ),
    (r"^lora_te2_|^text_encoder_2\.|transformer_blocks[._][1-9]", "SDXL"),
)
KINDS = (
    (r"\.(oft_|oft_R|boft_|oft_diag)", "an OFT"),
    (r"\.(on_input|ia3_l)", "an (IA)3"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "a GLoRA"),
    (r"\.vera_lambda|^vera_[AB]", "a VeRA"),
    (r"^(emb_params|string_to_param|clip_l$|clip_g$)", "a textual inversion"),
    (r"^bundle_emb\.", "a LoRA with a textual inversion of OneTrainer in it"),
    (r"^(image_proj|ip_adapter)", "an IP-Adapter"),
    (r"^(lora_controlnet|control_model|controlnet)", "a ControlNet"),
    (r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.", "a whole checkpoint"),
    (r"^(unet|text_encoder):\d+:", "a LoRA of cloneofsimo's first format"),
)


@dataclass(frozen=True)
class Kind:
    """A kind of file, in words, and the key that it was recognised by."""

    name: str
    key: str


def family_of(shapes: Shapes) -> str | None:
    """The models that an adapter is for; None when its names and sizes do not tell.

    >>> family_of({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 2048)})
    'SDXL'
    """
    for pattern, family in FAMILIES_BY_NAME:
        if any(re.search(pattern, key) for key in shapes):
            return family
    for key, shape in shapes.items():
        if re.search(
            r"attn2[._](processor\.)?to_[kv](_lora)?\.(lora_A|lora_down|lora\.down|down)[.a-z]*\.weight$", key
        ):
            return FAMILIES_BY_TEXT_WIDTH.get(shape[-1]) if len(shape) == 2 else None
    return None


def kind_of(shapes: Shapes) -> Kind | None:
    """What a file is, if it is no adapter that can be applied, and is recognised.

    >>> kind_of({"lora_unet_mid_block_attentions_0.oft_blocks": (4, 4)}).name
    'an OFT'
    """
    for pattern, name in KINDS:
        for key in shapes:
            if re.search(pattern, key):
                return Kind(name, key)
    return None
