from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch.fx import Node

from bestiary.diffusion.adapter import inject
from bestiary.diffusion.compiled_layers import use_compiled_forms
from compiled_traffic import step_graphs

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def small_unet() -> UNet2DConditionModel:
    """The layers of Stable Diffusion's UNet, once each."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
    )


def test_the_compiled_forms_compute_the_same() -> None:
    torch.manual_seed(0)
    unet = small_unet()
    parameters = inject(unet, rank=3, alpha=6, dropout=0.0, targets=TARGETS, seed=0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 7, 12)

    def run(predict: Callable[..., Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        for parameter in parameters:
            parameter.grad = None
        (prediction,) = predict(*inputs, return_dict=False)
        prediction.square().mean().backward()
        return prediction.detach(), [parameter.grad for parameter in parameters if parameter.grad is not None]

    plain, gradients = run(unet)
    use_compiled_forms(unet)
    eager, _ = run(unet)
    assert torch.equal(eager, plain)  # the forms are for the compiler only
    compiled, compiled_gradients = run(torch.compile(unet, backend="aot_eager", dynamic=False))
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-4, atol=1e-7)


def test_a_changed_adapter_autocast_and_a_copy_are_computed_right() -> None:
    unet = small_unet()
    parameters = inject(unet, rank=3, alpha=6, dropout=0.0, targets=TARGETS, seed=0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    attention = next(module for module in unet.modules() if isinstance(module, Attention))
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    use_compiled_forms(unet)
    autocast: Any = torch.autocast("cpu", dtype=torch.float16)(attention.forward)  # as Accelerate wraps a model
    compiled: Any = torch.compile(autocast, backend="aot_eager", dynamic=False)
    compiled(tokens).float().sum().backward()
    copied = deepcopy(attention)
    copied.to_q.merge()
    copied.to_v.enable_adapters(False)
    changed: Any = torch.compile(copied, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(changed(tokens), copied(tokens))
    assert not torch.allclose(copied(tokens), attention(tokens))


def test_a_compiled_step_copies_no_layouts_and_joins_its_products() -> None:
    """What a GPU's step is made of, traced without one."""
    plain, forms = traced(forms=False), traced(forms=True)
    assert {node.target for node in plain if is_scatter(node)}
    assert not [node for node in forms if is_scatter(node)]
    assert not all(in_channels_last(node) for node in plain if is_convolution(node))
    assert all(in_channels_last(node) for node in forms if is_convolution(node))
    products = [sum("mm" in str(node.target) for node in nodes) for nodes in (plain, forms)]
    # Forward, the three layers of the self-attention need 2 products instead of 9, and each other layer with an
    # adapter 2 instead of 3 (-12). Backward, they need 3 instead of 9, and three others 4 instead of 5 (-9); the
    # features of a caption need no gradient. The two halves of GEGLU are one more, forward and backward (+2).
    assert products[0] - products[1] == 12 + 9 - 2


def traced(*, forms: bool) -> list[Node]:
    """The operations of a training step, forward and backward, whose values have the layouts of a GPU."""
    graphs = step_graphs(small_unet().config, batch=2, resolution=64, forms=forms)
    return [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


def is_convolution(node: Node) -> bool:
    return "convolution" in str(node.target)


def is_scatter(node: Node) -> bool:
    return "index_put" in str(node.target)


def in_channels_last(node: Node) -> bool:
    """Whether a convolution reads and writes no image in another layout."""
    value = node.meta["val"]
    images = [value if isinstance(value, torch.Tensor) else value[0]]
    images += [argument.meta["val"] for argument in node.args[:2] if isinstance(argument, Node)]
    return all(image.is_contiguous(memory_format=torch.channels_last) for image in images)
