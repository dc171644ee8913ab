"""Layers of a UNet in forms that compile to faster kernels. Their results are the same up to rounding.

A step of training on a GPU is bound by what its kernels read and write. Profiled on an H200 (Stable Diffusion 1.5,
256 px, batch 256, 309 ms), the plain forms lose time in four places:

- a norm's contiguous result meets a convolution in channels_last, and 57 gradients are copied between layouts (11 ms)
- GEGLU's backward pass writes both halves of its input as one tensor, computing each half's formula for both (21 ms)
- matrices of LoRA rank 4 have rows that are not a multiple of 16 bytes, which only slow kernels can read, and each of
  their products reads or writes a whole activation again
- nearest upsampling scatters its gradients with atomic additions
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.upsampling import Upsample2D
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

ALIGNMENT = 8  # bfloat16 numbers in the 16 bytes that a fast matrix product reads at once
# Inductor writes a value to memory if several kernels need it and its formula reads more tensors, or has more
# operations, than these limits allow. With the default ones (4, 8 and 30), the gradient of a norm followed by SiLU is
# written, read again and copied to another layout, although every kernel could compute it from what it reads anyway.
INDUCTOR_OPTIONS: dict[str, Any] = {
    "realize_reads_threshold": 16,
    "realize_acc_reads_threshold": 16,
    "realize_opcount_threshold": 300,
}


def use_compiled_forms(unet: nn.Module) -> None:
    """Give the layers of `unet` their fast forms, which are used only inside torch.compile."""
    for module in unet.modules():
        if isinstance(module, Attention) and _joint(module):
            _add_form(module, _self_attention)
        elif isinstance(module, LoraLinear) and _plain(module):
            _add_form(module, _lora_linear)
        elif isinstance(module, nn.Conv2d) and not module.weight.requires_grad:
            _add_form(module, _convolution)
        elif isinstance(module, GEGLU) and isinstance(module.proj, nn.Linear):
            _add_form(module, _geglu)
        elif isinstance(module, Upsample2D) and _nearest(module):
            _add_form(module, _upsampling)


def _add_form(module: Any, form: Callable[..., torch.Tensor]) -> None:
    # A copy of the module gets a copy of a `partial`, but it would share a closure and with it this module's weights.
    module.forward = partial(_forward, module, form, module.forward)


def _forward(
    module: Any, form: Callable[..., torch.Tensor], plain: Callable[..., Any], *arguments: Any, **named: Any
) -> Any:
    if torch.compiler.is_compiling():
        return form(module, plain, *arguments, **named)
    return plain(*arguments, **named)


def _apply(function: type[torch.autograd.Function], *arguments: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = function.apply(*arguments)
    return result


# ---- convolutions ----


class _ChannelsLast(torch.autograd.Function):
    """The same tensor, with it and its gradient in channels_last."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


def _convolution(layer: nn.Conv2d, plain: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return _apply(_ChannelsLast, plain(_apply(_ChannelsLast, x)))


def _upsampling(
    layer: Upsample2D,
    plain: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    output_size: int | None = None,
    *arguments: Any,
    **named: Any,
) -> torch.Tensor:
    """Twice the size by repeating each pixel: its gradient is a sum of four."""
    if output_size is not None:
        return plain(hidden_states, output_size, *arguments, **named)
    b, c, h, w = hidden_states.shape
    repeated = hidden_states[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)
    convolution = layer.conv if layer.name == "conv" else layer.Conv2d_0
    result: torch.Tensor = convolution(repeated)
    return result


# ---- linear layers ----


def _geglu(layer: GEGLU, plain: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Two products for the two halves, so that each half has its own gradient."""
    (weight, gate), biases = layer.proj.weight.chunk(2), (None, None)
    if layer.proj.bias is not None:
        biases = layer.proj.bias.chunk(2)
    result: torch.Tensor = F.linear(x, weight, biases[0]) * layer.gelu(F.linear(x, gate, biases[1]))
    return result


class _Lora(torch.autograd.Function):
    """Linear layers that share their input x (M, K), each with LoRA matrices, as two products.

    The result [x W1' + b1 + x A1' B1', ...] is (M, N1 + N2 + ...): one product of [x, h] and [W, B] for
    h = x [A1; A2; ...]', where B is block-diagonal. `downs` is [A1; A2; ...] with rows of zeros up to a multiple of
    ALIGNMENT: (R, K). `ups` is B: (N1 + N2 + ..., R).
    """

    @staticmethod
    def forward(
        context: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        downs: torch.Tensor,
        ups: torch.Tensor,
    ) -> torch.Tensor:
        h = x @ downs.t()
        context.save_for_backward(x, h, weight, downs, ups)
        inputs, weights = torch.cat([x, h], 1), torch.cat([weight, ups], 1)
        return inputs @ weights.t() if bias is None else torch.addmm(bias, inputs, weights.t())

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, weight, downs, ups = context.saved_tensors
        of_x = None
        if context.needs_input_grad[0]:
            both = gradient @ torch.cat([weight, ups], 1)
            of_h = both[:, x.shape[1] :].contiguous()
            of_x = both[:, : x.shape[1]] + of_h @ downs
        else:
            of_h = gradient @ ups
        return of_x, None, None, of_h.t() @ x, gradient.t() @ h


def _lora(layers: list[LoraLinear], x: torch.Tensor) -> torch.Tensor:
    """The layers' results beside each other: (..., K) -> (..., N1 + N2 + ...)."""
    downs, ups = [], []
    for layer in layers:
        name = layer.active_adapters[0]
        downs.append(layer.lora_A[name].weight)
        ups.append(layer.lora_B[name].weight * layer.scaling[name])
    missing = -sum(down.shape[0] for down in downs) % ALIGNMENT
    weight = torch.cat([layer.base_layer.weight for layer in layers])
    bias = layers[0].base_layer.bias
    joint = _apply(
        _Lora,
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        F.pad(torch.cat(downs), (0, 0, 0, missing)),
        F.pad(torch.block_diag(*ups), (0, missing)),
    )
    return joint.view(*x.shape[:-1], joint.shape[-1])


def _lora_linear(layer: LoraLinear, plain: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if not _fit([layer], x):
        return plain(x)
    return _lora([layer], x)


def _self_attention(
    layer: Attention,
    plain: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **named: Any,
) -> torch.Tensor:
    """Queries, keys and values in one product."""
    layers = [layer.to_q, layer.to_k, layer.to_v]
    special = encoder_hidden_states is not None or attention_mask is not None or hidden_states.dim() != 3
    if special or not _fit(layers, hidden_states):
        return plain(hidden_states, encoder_hidden_states, attention_mask, **named)
    batch, tokens, _ = hidden_states.shape
    joint = _lora(layers, hidden_states)
    query, key, value = joint.view(batch, tokens, 3, layer.heads, -1).permute(2, 0, 3, 1, 4).unbind()
    attended = F.scaled_dot_product_attention(query, key, value)
    result: torch.Tensor = layer.to_out[0](attended.transpose(1, 2).reshape(batch, tokens, -1))
    return result


def _fit(layers: list[LoraLinear], x: torch.Tensor) -> bool:
    """Whether the layers can be joined now: adapters can be merged or disabled at any time.

    Not under autocast, which would give `_Lora` factors in different precisions.
    """
    return all(_plain(layer) for layer in layers) and not torch.is_autocast_enabled(x.device.type)


def _nearest(layer: Upsample2D) -> bool:
    """Whether a layer repeats each pixel and convolves, and nothing else."""
    return layer.use_conv and layer.interpolate and not layer.use_conv_transpose and layer.norm is None


def _plain(layer: object) -> bool:
    """Whether a layer is linear with one LoRA of the plain kind."""
    if not isinstance(layer, LoraLinear) or not isinstance(layer.base_layer, nn.Linear):
        return False
    names = layer.active_adapters
    if len(names) != 1 or layer.lora_variant or layer.merged or layer.disable_adapters:
        return False
    down, up = layer.lora_A[names[0]], layer.lora_B[names[0]]
    return isinstance(layer.lora_dropout[names[0]], nn.Identity) and down.bias is None and up.bias is None


def _joint(attention: Attention) -> bool:
    """Whether queries, keys and values can come from one product, with no other feature in use, such as a norm."""
    layers = attention.to_q, attention.to_k, attention.to_v
    return (
        isinstance(attention.processor, AttnProcessor2_0)
        and all(_plain(layer) and layer.base_layer.bias is None for layer in layers)
        and len({(layer.base_layer.weight.shape) for layer in layers}) == 1
        and not attention.is_cross_attention
        and attention.norm_q is None
        and attention.group_norm is None
        and attention.spatial_norm is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and attention.to_out[1].p == 0
    )
