"""What else a file may be than an adapter for Stable Diffusion, told by the names and sizes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

# The first tensor of a LoRA, or LoHa, by the program that wrote it: its last dimension is the layer's input.
FIRST = r"(_lora)?\.(processor\.)?(lora_A|lora_down|lora\.down|lora_linear_layer\.down|down|hada_w1_b)[.a-z]*$"
# The widths of the features that layers read tell the families apart, where their names do not.
FAMILIES_BY_WIDTH: tuple[tuple[str, dict[int, str]], ...] = (
    (
        rf"attn2[._](processor\.)?to_[kv]{FIRST}",  # the text features
        {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's refiner", 2048: "SDXL"},
    ),
    (
        rf"text_model[._].*(self_attn[._]([qkv]_proj|to_[qkv])|mlp[._]fc1){FIRST}",
        {1024: "Stable Diffusion 2.x", 1280: "SDXL"},  # 768 has Stable Diffusion 1.x, and SDXL's first one
    ),
    (
        rf"^(base_model\.model\.)?transformer\.transformer_blocks\.\d+\.attn\.to_[qkv]{FIRST}",
        {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3", 3072: "FLUX"},
    ),
)
FAMILIES_BY_NAME = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "FLUX"),
    (r"joint_blocks|lora_te3_|text_encoder_3\.", "Stable Diffusion 3"),
    (r"^(base_model\.model\.)?transformer\..*img_(mlp|mod)", "a diffusion transformer"),  # as wide as FLUX
)
FAMILIES_BY_NAME_ALONE = (
    (
        r"^(base_model\.model\.)?transformer\.|^diffusion_model\.(layers|blocks)|^lora_transformer_",
        "a diffusion transformer",
    ),
    (r"^lora_te2_|^text_encoder_2\.|transformer_blocks[._][1-9]|add_embedding|label_emb", "SDXL"),
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
    if family := _named(FAMILIES_BY_NAME, shapes):
        return family
    if family := _wide(*FAMILIES_BY_WIDTH[-1], shapes) or _named(FAMILIES_BY_NAME_ALONE, shapes):
        return family
    return next((family for by in FAMILIES_BY_WIDTH if (family := _wide(*by, shapes))), None)


def _named(patterns: Iterable[tuple[str, str]], shapes: Shapes) -> str | None:
    return next((family for pattern, family in patterns if any(re.search(pattern, key) for key in shapes)), None)


def _wide(pattern: str, widths: Mapping[int, str], shapes: Shapes) -> str | None:
    """The family that a layer's width tells."""
    found = (shape for key, shape in shapes.items() if re.search(pattern, key) and len(shape) == 2)
    return next((widths[shape[-1]] for shape in found if shape[-1] in widths), None)


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
