"""A base's weights in one file, by the names of the first Stable Diffusion code: the inverse of what is tested."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

# CompVis' code names a UNet's blocks by their position in one list, diffusers by level and kind.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def write_single_file(pipeline: StableDiffusionPipeline, file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the pipeline as one checkpoint with the layout of Stable Diffusion 1.x."""
    weights: dict[str, torch.Tensor] = {"alphas_cumprod": pipeline.scheduler.alphas_cumprod}
    layers = pipeline.unet.config.layers_per_block
    levels = len(pipeline.unet.config.block_out_channels)
    for name, value in pipeline.unet.state_dict().items():
        weights[f"model.diffusion_model.{_unet_name(name, layers, levels)}"] = value
    for name, value in pipeline.vae.state_dict().items():
        if ".attentions.0.to_" in name and value.dim() == 2:
            value = value[:, :, None, None]  # convolutions there
        weights[f"first_stage_model.{_vae_name(name, len(pipeline.vae.config.block_out_channels))}"] = value
    for name, value in pipeline.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name}"] = value
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file({name: value.to(dtype).contiguous() for name, value in weights.items()}, file)
    return file


def _renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(f"{ours}."):
            return f"{theirs}{name.removeprefix(ours)}"
    return name


def _unet_name(name: str, layers: int, levels: int) -> str:
    kind, *rest = name.split(".")
    if kind not in ("down_blocks", "up_blocks", "mid_block"):
        return _renamed(name, OUTER)
    if kind == "mid_block":
        part, number, *inner = rest
        place = f"middle_block.{2 * int(number) if part == 'resnets' else 1}"
        return f"{place}.{_renamed('.'.join(inner), RESNET if part == 'resnets' else {})}"
    level, part, number, *inner = rest
    tail = ".".join(inner)
    if kind == "down_blocks":
        position = 1 + int(level) * (layers + 1) + int(number)
        if part == "downsamplers":
            return f"input_blocks.{1 + int(level) * (layers + 1) + layers}.0.op.{tail.removeprefix('conv.')}"
        place = f"input_blocks.{position}"
    else:
        position = int(level) * (layers + 1) + int(number)
        if part == "upsamplers":
            here = 2 if _has_attention(int(level)) else 1
            return f"output_blocks.{int(level) * (layers + 1) + layers}.{here}.{tail}"
        place = f"output_blocks.{position}"
    return f"{place}.0.{_renamed(tail, RESNET)}" if part == "resnets" else f"{place}.1.{tail}"


def _has_attention(up_level: int) -> bool:
    return up_level > 0  # Stable Diffusion's first upward level has none


def _vae_name(name: str, levels: int) -> str:
    side, kind, *rest = name.split(".")
    if side not in ("encoder", "decoder"):
        return name
    tail = ".".join(rest)
    if kind == "conv_norm_out":
        return f"{side}.norm_out.{tail}"
    if kind == "mid_block":
        part, number, *inner = rest
        if part == "attentions":
            return f"{side}.mid.attn_1.{_renamed('.'.join(inner), ATTENTION)}"
        return f"{side}.mid.block_{int(number) + 1}.{'.'.join(inner)}"
    if kind in ("down_blocks", "up_blocks"):
        level, part, number, *inner = rest
        place = int(level) if kind == "down_blocks" else levels - 1 - int(level)
        direction = kind.removesuffix("_blocks")
        inner_name = ".".join(inner).replace("conv_shortcut", "nin_shortcut")
        if part == "resnets":
            return f"{side}.{direction}.{place}.block.{number}.{inner_name}"
        return f"{side}.{direction}.{place}.{direction}sample.{inner_name}"
    return name
