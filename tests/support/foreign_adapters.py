"""Adapters as other programs write them, with the real layouts of their keys, each with what it adds to the base.

`KINDS` maps a name to a function that writes the file and returns the changes by hand: W + delta, with no code of the
package.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in")
TEXT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


@dataclass
class Base:
    """The base's weights, by the names in its networks; the text encoder's with `text_model.` before them."""

    unet: Weights
    text: Weights
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def of(self, ends: tuple[str, ...]) -> Weights:
        """The weights (no biases) of the modules whose names end so, by module."""
        weights = self.text if ends == TEXT else self.unet
        found = {name.removesuffix(".weight"): value for name, value in weights.items() if name.endswith(".weight")}
        return {name: value for name, value in found.items() if f".{name}".endswith(tuple(f".{end}" for end in ends))}

    def normal(self, *shape: int, size: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random) * size


@dataclass
class Foreign:
    """A file, what it adds to the UNet's and the text encoder's parameters, and how many modules it changes."""

    path: Path
    added: Weights = field(default_factory=dict)
    by_rule_of_peft: bool = False  # DoRA, which is not linear in the adapter's weight


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def halves(
    base: Base, weights: Weights, rank: Callable[[str], int]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Random halves of a LoRA for each module: (rank, in, *kernel) and (out, rank, 1...)."""
    for name, weight in weights.items():
        outputs, inputs, *kernel = weight.shape
        down = base.normal(rank(name), inputs, *kernel)
        yield name, down, base.normal(outputs, rank(name), *(1 for _ in kernel))


def kohya_name(module: str) -> str:
    joined = module.replace(".", "_")
    return f"lora_te_{joined}" if module.startswith("text_model.") else f"lora_unet_{joined}"


def kohya(
    base: Base,
    file: Path,
    ends: tuple[tuple[str, ...], ...],
    *,
    rank: Callable[[str], int] = lambda _: 2,
    alpha: Callable[[int], float | None] = lambda rank: rank / 2,
    name: Callable[[str], str] = kohya_name,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> Foreign:
    """`lora_down`, `lora_up` and `alpha` by module, as kohya's scripts began it and most trainers write it."""
    content: Weights = {}
    added: Weights = {}
    for weights in map(base.of, ends):
        for module, down, up in halves(base, weights, rank):
            down, up = down.to(dtype), up.to(dtype)
            content |= {f"{name(module)}.lora_down.weight": down, f"{name(module)}.lora_up.weight": up}
            scale = 1.0
            if (value := alpha(len(down))) is not None:
                content[f"{name(module)}.alpha"] = torch.tensor(float(value)).to(dtype)
                scale = value / len(down)
            added[f"{module}.weight"] = product(down.float(), up.float()) * scale
    save_file(content, file, metadata)
    return Foreign(file, added)


def uneven(base: Base, file: Path) -> Foreign:
    """Ranks by block, or an adapter that was shrunk by singular values."""
    return kohya(base, file, (ATTENTION, TEXT), rank=lambda name: 1 + len(name) % 3, alpha=lambda rank: rank * 1.5 - 1)


def locon(base: Base, file: Path) -> Foreign:
    """LoCon (C3Lier): convolutions too, with `conv_dim` and `conv_alpha` of their own."""
    ends = (ATTENTION, FEED_FORWARD, CONVOLUTIONS)
    return kohya(base, file, ends, rank=lambda name: 1 if "conv" in name else 3, alpha=lambda _: 1.0)


def locon_with_core(base: Base, file: Path) -> Foreign:
    """LyCORIS's LoCon with `use_tucker`: a core between two halves of 1 x 1."""
    content: Weights = {}
    added: Weights = {}
    for module, weight in base.of(("conv1", "conv2")).items():
        outputs, inputs, *kernel = weight.shape
        down, mid, up = base.normal(3, inputs, 1, 1), base.normal(3, 3, *kernel), base.normal(outputs, 3, 1, 1)
        key = kohya_name(module)
        content |= {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
        content[f"{key}.alpha"] = torch.tensor(1.0)
        core = torch.tensordot(up[:, :, 0, 0], mid, 1)  # (out, rank, *kernel)
        added[f"{module}.weight"] = torch.einsum("orkl,ri->oikl", core, down[:, :, 0, 0]) / 3
    save_file(content, file, {"ss_network_module": "lycoris.kohya"})
    return Foreign(file, added)


def loha(base: Base, file: Path, ends: tuple[str, ...] = ATTENTION, lengths: bool = False) -> Foreign:
    content: Weights = {}
    added: Weights = {}
    for module, weight in base.of(ends).items():
        rows, columns, key = weight.shape[0], weight[0].numel(), kohya_name(module)
        parts = {f"hada_w{half}_a": base.normal(rows, 2) for half in "12"}
        parts |= {f"hada_w{half}_b": base.normal(2, columns) for half in "12"}
        content |= {f"{key}.{name}": value for name, value in parts.items()}
        content[f"{key}.alpha"] = torch.tensor(1.0)
        both = [parts[f"hada_w{half}_a"] @ parts[f"hada_w{half}_b"] for half in "12"]
        added[f"{module}.weight"] = (both[0] * both[1]).reshape(weight.shape) / 2
        if lengths:
            content[f"{key}.dora_scale"] = length = weight.flatten(1).norm(dim=1, keepdim=True) * 1.2
            whole = weight + added[f"{module}.weight"]
            added[f"{module}.weight"] = whole * length / whole.norm(dim=1, keepdim=True) - weight
    save_file(content, file, {"ss_network_module": "lycoris.kohya"})
    return Foreign(file, added)


def loha_with_cores(base: Base, file: Path) -> Foreign:
    content: Weights = {}
    added: Weights = {}
    for module, weight in base.of(("conv1", "conv2")).items():
        outputs, inputs, *kernel = weight.shape
        key, both = kohya_name(module), []
        for half in "12":
            core, left, right = base.normal(2, 2, *kernel), base.normal(2, outputs), base.normal(2, inputs)
            content |= {f"{key}.hada_t{half}": core, f"{key}.hada_w{half}_a": left, f"{key}.hada_w{half}_b": right}
            rows = torch.tensordot(left.T, core, 1)  # (out, rank, *kernel)
            both.append(torch.einsum("orkl,ri->oikl", rows, right))
        content[f"{key}.alpha"] = torch.tensor(1.0)
        added[f"{module}.weight"] = both[0] * both[1] / 2
    save_file(content, file)
    return Foreign(file, added)


def lokr(base: Base, file: Path, whole: bool = False) -> Foreign:
    content: Weights = {}
    added: Weights = {}
    for module, weight in base.of(ATTENTION).items():
        outputs, inputs, key = *weight.shape, kohya_name(module)
        first, left, right = base.normal(4, 4), base.normal(outputs // 4, 2), base.normal(2, inputs // 4)
        content[f"{key}.lokr_w1"] = first
        content |= {f"{key}.lokr_w2": left @ right} if whole else {f"{key}.lokr_w2_a": left, f"{key}.lokr_w2_b": right}
        content[f"{key}.alpha"] = torch.tensor(2.0 if whole else 1.0)
        added[f"{module}.weight"] = torch.kron(first, left @ right) * (1.0 if whole else 0.5)
    save_file(content, file)
    return Foreign(file, added)


def lokr_of_convolutions(base: Base, file: Path) -> Foreign:
    """The first factor in two halves; the second with a core for half of the modules, flat for the others."""
    content: Weights = {}
    added: Weights = {}
    for place, (module, weight) in enumerate(base.of(("conv1", "conv2")).items()):
        outputs, inputs, *kernel = weight.shape
        key, first = kohya_name(module), (base.normal(4, 2), base.normal(2, 4))
        content |= {f"{key}.lokr_w1_a": first[0], f"{key}.lokr_w1_b": first[1], f"{key}.alpha": torch.tensor(1.0)}
        if place % 2:
            left, right = base.normal(outputs // 4, 2), base.normal(2, inputs // 4 * 9)
            second = (left @ right).reshape(outputs // 4, inputs // 4, *kernel)
        else:
            core, left, right = base.normal(2, 2, *kernel), base.normal(2, outputs // 4), base.normal(2, inputs // 4)
            second = torch.einsum("rskl,ro,si->oikl", core, left, right)
            content[f"{key}.lokr_t2"] = core
        content |= {f"{key}.lokr_w2_a": left, f"{key}.lokr_w2_b": right}
        added[f"{module}.weight"] = torch.kron((first[0] @ first[1])[:, :, None, None], second.contiguous()) / 2
    save_file(content, file)
    return Foreign(file, added)


def length_of(weight: torch.Tensor, dims: list[int]) -> torch.Tensor:
    return weight.square().sum(dims, keepdim=True).sqrt()


def dora(base: Base, file: Path, axis: int = 0, only_some: bool = False) -> Foreign:
    """`dora_scale` beside the LoRA: LyCORIS's by row (axis 0), OneTrainer's and LyCORIS's old ones by column."""
    found = kohya(base, file, (ATTENTION, ("conv1",)))
    content, other = load_file(file), 1 - axis
    for place, (module, weight) in enumerate({**base.of(ATTENTION), **base.of(("conv1",))}.items()):
        if only_some and place % 2:
            continue
        dims = [other, *range(2, weight.ndim)]
        length = length_of(weight, dims)
        length = length * (1 + 0.2 * torch.rand(length.shape, generator=base.random))
        content[f"{kohya_name(module)}.dora_scale"] = length
        whole = weight + found.added[f"{module}.weight"]
        found.added[f"{module}.weight"] = whole * length / length_of(whole, dims) - weight
    save_file(content, file)
    return Foreign(file, found.added, by_rule_of_peft=axis == 0 and not only_some)


def differences(base: Base, file: Path) -> Foreign:
    """LyCORIS's `full` and norm modules: what is added to weights and biases, whole."""
    content: Weights = {}
    added: Weights = {}
    for module, weight in base.of(("to_q", "conv1", "proj_in")).items():
        added[f"{module}.weight"] = content[f"{kohya_name(module)}.diff"] = base.normal(*weight.shape, size=0.1)
    for module, weight in base.of(("conv1", "proj_in")).items():
        added[f"{module}.bias"] = content[f"{kohya_name(module)}.diff_b"] = base.normal(len(weight), size=0.1)
    for module, weight in base.of(("norm1", "norm", "conv_norm_out")).items():
        added[f"{module}.weight"] = content[f"{kohya_name(module)}.w_norm"] = base.normal(len(weight), size=0.1)
        added[f"{module}.bias"] = content[f"{kohya_name(module)}.b_norm"] = base.normal(len(weight), size=0.1)
    save_file(content, file)
    return Foreign(file, added)


def mixed(base: Base, file: Path) -> Foreign:
    """LyCORIS with an algorithm for each module: LoHa in the attention, LoRA elsewhere."""
    first = loha(base, file, ("to_q", "to_k"))
    second = kohya(base, file.with_name("second.safetensors"), (TEXT, ("conv1",)))
    save_file({**load_file(first.path), **load_file(second.path)}, file)
    return Foreign(file, first.added | second.added)


# ---- names of other programs ----


def first_name(module: str) -> str:
    """A UNet module's name in the first Stable Diffusion code, which ComfyUI and OneTrainer's newer files keep."""
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(attentions|resnets|downsamplers|upsamplers)\.(\d)\.(.+)", module)
    if not found:
        middle = re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d)\.(.+)", module)
        if middle:
            place = 1 if middle[1] == "attentions" else 2 * int(middle[2])
            return f"middle_block.{place}.{residual(middle[3])}"
        return {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}[module]
    side, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.{2 if block else 1}.conv"
    number = 3 * block + layer + (1 if side == "down" else 0)
    name = "input_blocks" if side == "down" else "output_blocks"
    return f"{name}.{number}.{0 if kind == 'resnets' else 1}.{residual(rest)}"


def residual(rest: str) -> str:
    names = {"conv1": "in_layers.2", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    return names.get(rest, rest)


def onetrainer(module: str) -> str:
    return f"clip_l.{module}" if module.startswith("text_model.") else f"unet.{first_name(module)}"


def comfyui(module: str) -> str:
    text = module.startswith("text_model.")
    return f"text_encoders.clip_l.transformer.{module}" if text else f"diffusion_model.{first_name(module)}"


def comfyui_extraction(base: Base, file: Path) -> Foreign:
    """ComfyUI's "Extract and Save Lora": float16 halves without alpha, and the differences of the biases."""
    found = kohya(base, file, (ATTENTION, CONVOLUTIONS, TEXT), alpha=lambda _: None, name=comfyui, dtype=torch.float16)
    content = load_file(file)
    for module in base.of(("conv1", "to_out.0")):
        bias = base.unet[f"{module}.bias"]
        content[f"{comfyui(module)}.diff_b"] = added = base.normal(len(bias)).half()
        found.added[f"{module}.bias"] = added.float()
    save_file(content, file)
    return found


def joined_first_names(base: Base, file: Path) -> Foreign:
    def name(module: str) -> str:
        return f"lora_unet_{first_name(module).replace('.', '_')}"

    return kohya(base, file, (ATTENTION, FEED_FORWARD, CONVOLUTIONS), name=name)


def lycoris(base: Base, file: Path) -> Foreign:
    """What LyCORIS names its modules without kohya's scripts, as in SimpleTuner."""
    return kohya(base, file, (ATTENTION,), name=lambda module: f"lycoris_{module.replace('.', '_')}")


def numbered_text_encoder(base: Base, file: Path) -> Foreign:
    def name(module: str) -> str:
        return kohya_name(module).replace("lora_te_", "lora_te1_")

    return kohya(base, file, (ATTENTION, TEXT), name=name)


def ai_toolkit(base: Base, file: Path) -> Foreign:
    metadata = {"software": json.dumps({"name": "ai-toolkit"}), "ss_base_model_version": "sd_1.5", "format": "pt"}
    return kohya(base, file, (ATTENTION, FEED_FORWARD, CONVOLUTIONS, TEXT), dtype=torch.float16, metadata=metadata)


def onetrainer_legacy(base: Base, file: Path) -> Foreign:
    metadata = {"ot_branch": "master", "ot_revision": "0", "modelspec.architecture": "stable-diffusion-v1/lora"}
    return kohya(base, file, (ATTENTION, TEXT), alpha=lambda _: 1.0, dtype=torch.bfloat16, metadata=metadata)


def lcm_lora(base: Base, file: Path) -> Foreign:
    file = file.with_name("lcm-lora-sdv1-5.safetensors")
    return kohya(base, file, (ATTENTION, FEED_FORWARD, CONVOLUTIONS), alpha=lambda rank: rank, dtype=torch.float16)


# ---- diffusers and PEFT ----


def old_diffusers(base: Base, file: Path) -> Foreign:
    """Before 0.22: the LoRA in the attention's processors, `to_q_lora`, `lora_linear_layer` in the text encoder."""
    content: Weights = {}
    added: Weights = {}
    for module, down, up in halves(base, base.of(ATTENTION), lambda _: 2):
        key = re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".processor.to_\1_lora", module)
        content |= {f"unet.{key}.down.weight": down, f"unet.{key}.up.weight": up}
        added[f"{module}.weight"] = product(down, up)
    for module, down, up in halves(base, base.of(TEXT), lambda _: 2):
        key = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1_lora", module)
        key = key if key != module else f"{module}.lora_linear_layer"
        content |= {f"text_encoder.{key}.down.weight": down, f"text_encoder.{key}.up.weight": up}
        added[f"{module}.weight"] = product(down, up)
    save_file(content, file)
    return Foreign(file, added)


def diffusers_bin(base: Base, file: Path) -> Foreign:
    content: Weights = {}
    added: Weights = {}
    file = file.with_name("pytorch_lora_weights.bin")
    for weights, part in ((base.of(ATTENTION), "unet"), (base.of(TEXT), "text_encoder")):
        ending = "lora" if part == "unet" else "lora_linear_layer"
        for module, down, up in halves(base, weights, lambda _: 2):
            content |= {f"{part}.{module}.{ending}.down.weight": down, f"{part}.{module}.{ending}.up.weight": up}
            added[f"{module}.weight"] = product(down, up)
    torch.save(content, file)
    return Foreign(file, added)


def peft_model(base: Base, network: torch.nn.Module, config: Mapping[str, object]) -> tuple[Any, Weights]:
    """PEFT's model with random weights, and what its own merge adds to the network."""
    from peft import LoraConfig, get_peft_model

    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = get_peft_model(network, LoraConfig(r=2, lora_alpha=3, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(base.normal(*parameter.shape))
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    return model, {name: merged[name] - value for name, value in before.items()}


def peft_folder(base: Base, folder: Path, network: torch.nn.Module, config: Mapping[str, object]) -> Foreign:
    model, added = peft_model(base, network, config)
    model.save_pretrained(folder)
    prefix = "text_model." if any(name.startswith("encoder.") for name in added) else ""
    return Foreign(folder, {f"{prefix}{name}": value for name, value in added.items() if value.any()})


KINDS: dict[str, Callable[[Base, Path], Foreign]] = {
    "kohya": lambda base, file: kohya(base, file, (ATTENTION, FEED_FORWARD)),
    "kohya with the text encoder": lambda base, file: kohya(base, file, (ATTENTION, TEXT)),
    "kohya, only the text encoder": lambda base, file: kohya(base, file, (TEXT,)),
    "kohya without alphas": lambda base, file: kohya(base, file, (ATTENTION, TEXT), alpha=lambda _: None),
    "kohya with a numbered text encoder": numbered_text_encoder,
    "kohya with ranks and alphas by module": uneven,
    "LoCon": locon,
    "LoCon with a core tensor": locon_with_core,
    "LoHa": loha,
    "LoHa of convolutions": lambda base, file: loha(base, file, ("conv1", "conv2")),
    "LoHa with core tensors": loha_with_cores,
    "LoHa with DoRA": lambda base, file: loha(base, file, lengths=True),
    "LoKr": lokr,
    "LoKr of two whole factors": lambda base, file: lokr(base, file, whole=True),
    "LoKr of convolutions": lokr_of_convolutions,
    "DoRA": dora,
    "DoRA by column": lambda base, file: dora(base, file, axis=1),
    "DoRA of some modules": lambda base, file: dora(base, file, only_some=True),
    "whole differences and norms": differences,
    "LoHa, LoRA and LoCon in one file": mixed,
    "the first code's names, joined": joined_first_names,
    "LyCORIS without kohya": lycoris,
    "OneTrainer": onetrainer_legacy,
    "OneTrainer, newer": lambda base, file: kohya(base, file, (ATTENTION, CONVOLUTIONS, TEXT), name=onetrainer),
    "ComfyUI": lambda base, file: kohya(base, file, (ATTENTION, FEED_FORWARD, TEXT), name=comfyui),
    "ComfyUI's extraction": comfyui_extraction,
    "ai-toolkit": ai_toolkit,
    "LCM-LoRA": lcm_lora,
    "diffusers before 0.22": old_diffusers,
    "diffusers' .bin": diffusers_bin,
}
