"""The names of an adapter's tensors: which network, which module and what each one is, whatever program wrote the file.

Each trainer has its own spelling. They all become one: the part, the module by diffusers' name (`down_blocks.0...`,
`text_model.encoder.layers.0...`), and a field (`lora_A.weight`, `alpha`, `hada_w1_a`, ...).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from bestiary.diffusion.adapter_format import Part

KOHYA_PREFIX, KOHYA_TEXT_PREFIX = "lora_unet_", "lora_te_"
# Who joins a module's names by underscores: kohya's scripts, OneTrainer, ai-toolkit; LyCORIS alone; with a number, the
# text encoder as trainers for several of them call it.
JOINED_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lycoris_")
# Who keeps the dots: diffusers; PEFT; ComfyUI; OneTrainer's newer files (clip_l).
DOTTED_PREFIXES = (
    "base_model.model.", "unet.", "text_encoder.", "diffusion_model.", "text_encoders.clip_l.transformer.", "clip_l.",
)  # fmt: skip
# Names with underscores of their own, longer ones before those that they start with.
COMPOUND_NAMES = re.compile(
    "down_blocks|up_blocks|mid_block|transformer_blocks|to_q|to_k|to_v|to_out|proj_in|proj_out|time_emb_proj|"
    "conv_in|conv_out|conv_shortcut|conv_norm_out|time_embedding|linear_1|linear_2|"
    "input_blocks|middle_block|output_blocks|time_embed|in_layers|out_layers|emb_layers|skip_connection|"
    "text_model|self_attn|q_proj|k_proj|v_proj|out_proj|layer_norm1|layer_norm2|final_layer_norm"
)
SPELLINGS = {
    "lora_A.weight": ("lora_A.default.weight", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"),
    "lora_B.weight": ("lora_B.default.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"),
    "lora_mid.weight": (),
    "lora_magnitude_vector": ("lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"),
}
OTHER_FIELDS = (
    "alpha", "dora_scale", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "diff", "diff_b", "w_norm", "b_norm",
)  # fmt: skip
FIELDS = {spelling: field for field, others in SPELLINGS.items() for spelling in (field, *others)} | {
    field: field for field in OTHER_FIELDS
}
KNOWN_MODULES: dict[Part, re.Pattern[str]] = {
    "unet": re.compile(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|conv_norm_out|time_embedding)(\.|$)"),
    "text_encoder": re.compile(r"text_model\.(encoder|final_layer_norm)(\.|$)"),
}
# The parts of a residual block in the first Stable Diffusion code.
RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
FIRST_NAMES = {
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
}  # fmt: skip


class TensorName(NamedTuple):
    """Which network a tensor is for, the module in it, and what the tensor is."""

    part: Part
    module: str
    field: str


def tensor_name(key: str) -> TensorName | None:
    """What a key of an adapter's file names; None for a key that no known program writes.

    >>> tensor_name("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight")
    TensorName(part='unet', module='mid_block.attentions.0.proj_in', field='lora_A.weight')
    """
    split = _split(key)
    if split is None:
        return None
    prefix, module, field = split
    if prefix in JOINED_PREFIXES:
        kept = COMPOUND_NAMES.sub(lambda found: found[0].replace("_", "\0"), module)
        module = kept.replace("_", ".").replace("\0", "_")
    if module.startswith("encoder.layers."):  # as recent versions of transformers name them
        module = f"text_model.{module}"
    module = _from_first_names(module)
    for part, known in KNOWN_MODULES.items():
        if known.match(module) and part == _part_of(prefix, part):
            return TensorName(part, module, field)
    return None


def _split(key: str) -> tuple[str, str, str] | None:
    """The prefix that tells the program, the module as it is spelled, and the field."""
    prefix = next((prefix for prefix in JOINED_PREFIXES if key.startswith(prefix)), "")
    if prefix:
        module, _, ending = key.removeprefix(prefix).partition(".")
        return (prefix, module, FIELDS[ending]) if ending in FIELDS else None
    while known := next((known for known in DOTTED_PREFIXES if key.startswith(known)), None):
        prefix, key = (
            prefix or known,
            key.removeprefix(known),
        )  # diffusers' scripts once left PEFT's prefix after theirs
    # Before 0.22, diffusers kept the LoRA in the processors of the attention.
    key = re.sub(r"\.processor\.to_(q|k|v|out)_lora\.", _from_processor, key)
    key = re.sub(r"\.to_(q|k|v|out)_lora\.", r".\1_proj.lora.", key)  # and that of the text encoder beside them
    endings = [key.split(".", count)[-1] for count in range(1, key.count(".") + 1)]
    for ending in endings:  # the longest first
        if ending in FIELDS:
            return prefix, key.removesuffix(f".{ending}"), FIELDS[ending]
    return None


def _from_processor(found: re.Match[str]) -> str:
    return f".to_{found[1]}{'.0' if found[1] == 'out' else ''}.lora."


def _part_of(prefix: str, named: Part) -> Part:
    """The part that a prefix stands for; the one that the module's name says for a prefix that both parts have."""
    if prefix in ("lora_unet_", "unet.", "diffusion_model."):
        return "unet"
    if prefix in ("lora_te_", "lora_te1_", "text_encoder.", "clip_l.", "text_encoders.clip_l.transformer."):
        return "text_encoder"
    return named


def _from_first_names(module: str) -> str:
    """A module's name in diffusers, from that in the first Stable Diffusion code; other names stay.

    The numbers are those of Stable Diffusion 1.x and 2.x, whose blocks have two layers (three on the way up).
    """
    if module in FIRST_NAMES:
        return FIRST_NAMES[module]
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", module):
        place = int(found[1])
        return f"mid_block.{_inner('attentions.0' if place == 1 else f'resnets.{place // 2}', found[2])}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d{1,2})\.([012])\.(.+)", module)
    if not found:
        return module
    down, place, rest = found[1] == "input", int(found[3]), found[4]
    block, layer = divmod(int(found[2]) - (1 if down else 0), 3)
    side = "down_blocks" if down else "up_blocks"
    if rest == "op":
        return f"{side}.{block}.downsamplers.0.conv"
    if rest == "conv":
        return f"{side}.{block}.upsamplers.0.conv"
    return f"{side}.{block}.{_inner(f'attentions.{layer}' if place else f'resnets.{layer}', rest)}"


def _inner(name: str, rest: str) -> str:
    return f"{name}.{RESIDUAL.get(rest, rest) if name.startswith('resnets') else rest}"
