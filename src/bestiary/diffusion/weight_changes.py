"""Changes of a network's weights that are no plain low-rank product: LoHa, LoKr, LoCon with a core tensor, DoRA, ...

PEFT adds its LoRA to what a layer computes. These changes are added to the layer's weights instead, as A1111 and
ComfyUI do it: W + sum of weight * change. The base's own weights are kept beside, so weight 0 gives exactly the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

LORA = frozenset({"lora_A.weight", "lora_B.weight"})
LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
LOKR_FIRST = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
LOKR_SECOND = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
# The tensors that make a kind's change of a weight, besides `dora_scale` and those of a bias.
KINDS: dict[frozenset[str], str] = {
    frozenset({"diff"}): "weight difference",
    frozenset({"w_norm"}): "weight difference",
    LORA: "LoRA",
    LORA | {"lora_mid.weight"}: "LoCon with a core tensor",
    LOHA: "LoHa",
    LOHA | {"hada_t1", "hada_t2"}: "LoHa",
    **{frozenset(first | second): "LoKr" for first in LOKR_FIRST for second in LOKR_SECOND},
}
BIAS_FIELDS = ("diff_b", "b_norm")


@dataclass(frozen=True)
class WeightChange:
    """The change of one module: its tensors by the names that LyCORIS gives them, and its alpha."""

    tensors: Mapping[str, torch.Tensor]
    alpha: float | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all the tensors that one kind needs are there, and no others."""
        names = self._weight_names()
        return names in KINDS or (not names and "dora_scale" not in self.tensors)

    @property
    def kind(self) -> str:
        """The kind of the change, in words."""
        kind = KINDS.get(self._weight_names(), "weight difference")
        if "dora_scale" not in self.tensors:
            return kind
        return "DoRA" if kind == "LoRA" else f"{kind} with DoRA"

    @property
    def rank(self) -> int | None:
        """The rank of its low-rank factors; None when it has none."""
        for name in ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in self.tensors and self.tensors[name].ndim > 1:
                return int(self.tensors[name].shape[0])
        return None

    def delta(self, weight: torch.Tensor) -> torch.Tensor | None:
        """What the change adds to a layer's `weight`, in float32 and on its device; None for nothing.

        Raises RuntimeError when the tensors do not fit together, or not the weight.
        """
        tensors = {name: value.to(weight.device, torch.float32) for name, value in self.tensors.items()}
        product = _product(tensors)
        if product is None:
            return None
        scale = 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank
        delta = product.reshape(weight.shape) * scale
        if "dora_scale" in tensors:
            delta = _with_lengths(weight.float() + delta, tensors["dora_scale"]) - weight.float()
        return delta

    def bias_delta(self, bias: torch.Tensor) -> torch.Tensor | None:
        """What the change adds to a layer's `bias`; None for nothing. Raises RuntimeError when it does not fit."""
        added = next((self.tensors[name] for name in BIAS_FIELDS if name in self.tensors), None)
        return None if added is None else added.to(bias.device, torch.float32).reshape(bias.shape)

    def _weight_names(self) -> frozenset[str]:
        return frozenset(self.tensors) - {"dora_scale", *BIAS_FIELDS}


def _product(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The change before it is scaled: the elements of the layer's weight, in their order."""
    for name in ("diff", "w_norm"):
        if name in tensors:
            return tensors[name]
    if "lora_mid.weight" in tensors:
        up, down = tensors["lora_B.weight"].flatten(1).T, tensors["lora_A.weight"].flatten(1)
        return _with_core(tensors["lora_mid.weight"], up, down)
    if "lora_A.weight" in tensors:
        return tensors["lora_B.weight"].flatten(1) @ tensors["lora_A.weight"].flatten(1)
    if "hada_w1_a" in tensors:  # LoHa, arXiv:2108.06098: the elementwise product of two low-rank matrices
        return _half(tensors, "hada_w1", "hada_t1") * _half(tensors, "hada_w2", "hada_t2")
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:  # LoKr, arXiv:2309.14859: a Kronecker product
        first, second = _half(tensors, "lokr_w1", ""), _half(tensors, "lokr_w2", "lokr_t2")
        first = first.reshape(*first.shape, *(1 for _ in second.shape[first.ndim :]))
        return torch.kron(first, second.contiguous())  # torch's fails on a factor that is not contiguous
    return None


def _half(tensors: Mapping[str, torch.Tensor], name: str, core: str) -> torch.Tensor:
    """A whole factor, or the product of its two parts, with a core tensor between them if there is one."""
    if name in tensors:
        return tensors[name]
    left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return _with_core(tensors[core], left, right) if core in tensors else left @ right


def _with_core(core: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Tucker's decomposition: core (r, r, *kernel), left (r, out), right (r, in) give (out, in, *kernel)."""
    product: torch.Tensor = torch.einsum("rs...,ro,si->oi...", core, left, right)
    return product


def scales_output(length: torch.Tensor, outputs: int) -> bool:
    """Whether DoRA's lengths are those of the weight's rows, one for each output, as in the paper and in PEFT.

    LyCORIS and OneTrainer also know the lengths of the columns, one for each input: (1, in, 1...).
    """
    return length.ndim < 2 or length.shape[0] == outputs or length.shape[0] != 1


def _with_lengths(whole: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The weight with its rows, or columns, brought to these lengths (DoRA, arXiv:2402.09353)."""
    axis = 0 if scales_output(length, whole.shape[0]) else 1
    shape = [1] * whole.ndim
    shape[axis] = whole.shape[axis]
    norms: torch.Tensor = whole.transpose(0, axis).flatten(1).norm(dim=1)
    return whole * (length.reshape(shape) / norms.reshape(shape))


# ---- the changes in a network ----


@dataclass
class _Applied:
    """The changes in a network by adapter and module, the base's own values, and the weights that are in effect."""

    changes: dict[str, Mapping[str, WeightChange]] = field(default_factory=dict)
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


_applied: WeakKeyDictionary[torch.nn.Module, _Applied] = WeakKeyDictionary()


def misfit(network: torch.nn.Module, changes: Mapping[str, WeightChange]) -> str | None:
    """Why the changes do not fit the network; None when they do. Nothing is computed, so no memory is needed."""
    for module, change in changes.items():
        for name, delta in (("weight", change.delta), ("bias", change.bias_delta)):
            value = getattr(_layer(network, module), name, None)
            try:
                delta(torch.empty(0 if value is None else value.shape, device="meta"))
            except (RuntimeError, IndexError, ValueError):
                return f"the {change.kind} of {module} does not have the sizes of its {name}"
    return None


def unknown_modules(network: torch.nn.Module, modules: Iterable[str]) -> list[str]:
    """The modules that the network does not have."""
    return [module for module in modules if _layer(network, module) is None]


def add_changes(network: torch.nn.Module, adapter: str, changes: Mapping[str, WeightChange]) -> None:
    """Put an adapter's changes beside those that are there. They take effect with `set_change_weights`."""
    if changes:
        _applied.setdefault(network, _Applied()).changes[adapter] = changes


def set_change_weights(network: torch.nn.Module, weights: Mapping[str, float]) -> None:
    """Set the weight of each adapter's changes; an adapter that is not named has none."""
    applied = _applied.get(network)
    if applied is None:
        return
    active = {adapter: weights[adapter] for adapter in applied.changes if weights.get(adapter)}
    if active == applied.weights:
        return
    for module in {module for changes in applied.changes.values() for module in changes}:
        for name in ("weight", "bias"):
            _set(network, applied, module, name, active)
    applied.weights = active


def has_changes(network: torch.nn.Module) -> bool:
    """Whether an adapter's changes are in the network, whatever their weight."""
    return network in _applied


def remove_changes(network: torch.nn.Module) -> None:
    """Give the network its own weights again."""
    set_change_weights(network, {})
    _applied.pop(network, None)


def _set(network: torch.nn.Module, applied: _Applied, module: str, name: str, active: Mapping[str, float]) -> None:
    """Set one weight, or bias, to the base's own plus the changes of the active adapters."""
    value = getattr(_layer(network, module), name, None)
    if value is None:
        return
    own = applied.originals.get(f"{module}.{name}", value.data)
    total, changed = own.float(), False
    for adapter, weight in active.items():
        change = applied.changes[adapter].get(module)
        if change is None:
            continue
        delta = change.delta(own.to(value.device)) if name == "weight" else change.bias_delta(value)
        if delta is not None:
            total, changed = total.to(value.device) + weight * delta, True
    if changed:
        applied.originals.setdefault(f"{module}.{name}", own.clone())
    if changed or f"{module}.{name}" in applied.originals:
        value.data.copy_(total if changed else own)


def _layer(network: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """The network's own layer of this name, also where PEFT has wrapped it."""
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        return None
    while isinstance(inner := getattr(layer, "base_layer", None), torch.nn.Module):
        layer = inner
    return layer
