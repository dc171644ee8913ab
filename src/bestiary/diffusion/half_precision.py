"""Train float32 weights of a UNet that computes in bfloat16, without autocast.

On a GPU, autocast computes every norm in float32 and casts its output again for each layer that reads it. Here the UNet
and its inputs are bfloat16, and it computes with bfloat16 copies of the float32 weights that the optimizer changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainedWeights:
    """The float32 weights that the optimizer changes, and the parameters that the UNet computes with.

    With `dtype` float32 both are the same tensors. Otherwise all weights lie in one vector, and the parameters are
    parts of its rounded copy: an adapter has hundreds of small tensors, and a GPU needs longer to start their kernels
    than to run them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.parameters = list(parameters)
        self.weights = self.parameters
        self._copy: torch.Tensor | None = None
        if dtype is not torch.float32:
            flat = torch.cat([parameter.detach().float().flatten() for parameter in parameters])
            self.weights = [nn.Parameter(flat)]
            self._copy = flat.to(dtype)
            self._point_to(self._copy)

    @torch.no_grad()
    def spread(self) -> None:
        """Round the weights into the UNet's parameters: to be called whenever the weights have changed."""
        if self._copy is not None:
            self._copy.copy_(self.weights[0])

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Move the gradients of the UNet's parameters to the weights, where they add up in float32."""
        if self._copy is None:
            return
        gradients = torch.cat([_gradient(parameter) for parameter in self.parameters]).float()
        self.weights[0].grad = gradients if self.weights[0].grad is None else self.weights[0].grad + gradients
        self.forget_gradients()

    def average_gradients(self, accelerator: Accelerator) -> None:
        """Average the weights' gradients over all processes, unless DistributedDataParallel has done it."""
        if self._copy is not None and accelerator.num_processes > 1:
            self.weights[0].grad = accelerator.reduce(self.weights[0].grad, reduction="mean")

    def forget_gradients(self) -> None:
        """Drop the gradients of the UNet's parameters."""
        for parameter in self.parameters:
            parameter.grad = None

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Inside, the UNet has the float32 weights themselves, as a saved adapter has them."""
        self.give_back()
        try:
            yield
        finally:
            if self._copy is not None:
                self._point_to(self._copy)

    def give_back(self) -> None:
        """Leave the float32 weights in the UNet."""
        if self._copy is not None:
            self._point_to(self.weights[0].data)
            for parameter in self.parameters:  # a file of tensors that share their memory cannot be written
                parameter.data = parameter.data.clone()

    def _point_to(self, flat: torch.Tensor) -> None:
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.data = part.view(parameter.shape)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
