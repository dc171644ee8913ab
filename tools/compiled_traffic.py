"""Count what a compiled training step reads and writes on a GPU, on a machine without one.

Inductor plans the step for an NVIDIA GPU: which kernels it needs, and in which layouts they read and write. Nothing
runs. A GPU's time follows these bytes only roughly: products and convolutions also have to be calculated. Standard
attention stands for the GPU's own.

python tools/compiled_traffic.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx, scheduler
from torch._inductor import config as inductor
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from bestiary.diffusion.adapter import inject
from bestiary.diffusion.compiled_layers import INDUCTOR_OPTIONS, use_compiled_forms

GPU = torch.device("cuda", 0)
PROPERTIES = DeviceProperties(
    type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2_048, max_threads_per_block=1_024, warp_size=32,
)  # fmt: skip  # an H100 or H200
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
STABLE_DIFFUSION = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # version 1.5


class Traffic(NamedTuple):
    """What one training step reads and writes, in bytes."""

    generated: int  # by the kernels that Inductor writes
    library: int  # by matrix products, convolutions and attention
    kernels: int


@click.command()
@click.option(
    "--base", type=click.Path(exists=True, path_type=Path), help="A model's folder.  [default: the size of SD 1.5]"
)
@click.option("--batch", default=256, show_default=True)
@click.option("--resolution", default=256, show_default=True, help="In pixels.")
def main(base: Path | None, batch: int, resolution: int) -> None:
    """Print the traffic of the plain layers and of compiled_layers.py, each as one line."""
    sizes = UNet2DConditionModel.load_config(base / "unet") if base else STABLE_DIFFUSION
    click.echo(f"{'layers':<32}{'generated GB':>14}{'library GB':>12}{'sum GB':>8}{'kernels':>9}")
    settings: list[tuple[str, bool, dict[str, Any]]] = [
        ("plain", False, {}),
        ("plain, INDUCTOR_OPTIONS", False, INDUCTOR_OPTIONS),
        ("compiled forms", True, {}),
        ("compiled forms, INDUCTOR_OPTIONS", True, INDUCTOR_OPTIONS),
    ]
    for name, forms, options in settings:
        found = traffic(sizes, batch, resolution, forms=forms, options=options)
        generated, library = found.generated / 1e9, found.library / 1e9
        click.echo(f"{name:<32}{generated:>14.2f}{library:>12.2f}{generated + library:>8.2f}{found.kernels:>9}")


def traffic(sizes: Any, batch: int, resolution: int, *, forms: bool, options: dict[str, Any]) -> Traffic:
    """Plan a step of `batch` images of `resolution` pixels in bfloat16, with LoRA of rank 4."""
    graphs = step_graphs(sizes, batch, resolution, forms=forms)
    with _as_on_a_gpu(), inductor.patch({**options, "shape_padding": False}):
        kernels = [kernel for graph in graphs for kernel in _planned(graph)]
    generated = sum(size for library, size in kernels if not library)
    library = sum(size for library, size in kernels if library)
    return Traffic(generated, library, sum(size > 0 for _, size in kernels))


def step_graphs(sizes: Any, batch: int, resolution: int, *, forms: bool) -> list[GraphModule]:
    """The operations of the forward and of the backward pass, traced without values, in the layouts of a GPU."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        forward: Callable[..., Any] = graph.forward
        return forward

    torch._dynamo.reset()
    unet = UNet2DConditionModel.from_config(sizes)
    inject(unet, rank=4, alpha=4, dropout=0.0, targets=TARGETS, seed=0)
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if forms:
        use_compiled_forms(unet)
    on_gpu = patch("torch._meta_registrations.device_hint", return_value="cuda")
    with on_gpu, FakeTensorMode(allow_non_fake_inputs=True):
        backend: Any = aot_autograd(
            fw_compiler=keep,
            bw_compiler=keep,
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )
        side, width = resolution // 8, unet.config.cross_attention_dim
        noisy = torch.randn(batch, unet.config.in_channels, side, side, dtype=torch.bfloat16)
        features = torch.randn(batch, 77, width, dtype=torch.bfloat16)
        predict: Any = torch.compile(unet, backend=backend, dynamic=False)
        (prediction,) = predict(noisy, torch.zeros(batch, dtype=torch.long), features, return_dict=False)
        prediction.float().square().mean().backward()
    return graphs


def _planned(graph: GraphModule) -> list[tuple[bool, int]]:
    """Inductor's kernels for a graph: whether each one is from a library, and what it reads and writes, in bytes."""
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": GPU}
        node.args = tuple(GPU if isinstance(argument, torch.device) else argument for argument in node.args)
    graph.recompile()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
            for value in (node.meta["val"] for node in graph.graph.find_nodes(op="placeholder"))
        ]
    view_to_reshape(graph)
    with torch.no_grad(), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*inputs)
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*inputs)
        lowering = GraphLowering(graph, example_inputs=inputs)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            return [
                (isinstance(node, scheduler.ExternKernelSchedulerNode), node.get_read_write_buffers_sizes())
                for node in lowering.scheduler.nodes
            ]


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Inside, torch and Inductor answer as if this machine had a GPU with cuDNN and Triton."""
    answers: dict[str, Any] = {
        "torch.cuda.is_available": True,
        "torch.cuda.current_device": 0,
        "torch.cuda.get_device_capability": (9, 0),
        "torch._inductor.runtime.hints.DeviceProperties.create": PROPERTIES,
        "torch._inductor.scheduler.has_triton": True,
        "torch._inductor.utils.is_big_gpu": True,
    }
    with ExitStack() as patched:
        for name, answer in answers.items():
            patched.enter_context(patch(name, return_value=answer))
        patched.enter_context(patch("torch._C._conv_determine_backend_memory_format", _cudnn_layout))
        yield


def _cudnn_layout(images: torch.Tensor, weights: torch.Tensor, _backend: object) -> torch.memory_format:
    """channels_last if the images or the weights of a convolution are."""
    layout = torch.channels_last
    found = any(each.is_contiguous(memory_format=layout) and not each.is_contiguous() for each in (images, weights))
    return layout if found else torch.contiguous_format


if __name__ == "__main__":
    main()
