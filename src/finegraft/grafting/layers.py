"""Layer functions at run time: the base's own, and those that changes make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finegraft.deltas.delta import channel_norms, precise
from finegraft.deltas.states import States
from finegraft.grafting.slot import Slot
from finegraft.locate.ops import Op, plain
from finegraft.quantised.stored import dense, logical_shape

if TYPE_CHECKING:
    from finegraft.grafting.standing import Standing


class BaseLayer:
    """The base's layer, with gradients for whatever is trained inside its tensors.

    Args:
        module: the base's module.
        op: how it computes.
        call: its own forward, taking the input.
        standing: what is written in its tensors; None reads them as they are.
    """

    def __init__(self, module: Any, op: Op, call: Callable[[Tensor], Any], standing: Standing | None = None) -> None:
        self.module, self.op, self._call = module, op, call
        self._standing = standing if standing is not None and standing.acts else None

    @property
    def bare(self) -> bool:
        weight = self.module._parameters.get("weight")
        return self._standing is None and type(weight) is nn.Parameter and weight.is_floating_point()

    @property
    def states(self) -> States | None:
        return getattr(self._call, "states", None)

    def _stored(self, name: str) -> Any:
        attachment = self.module._modules.get("finegraft")
        if attachment is not None and attachment.chain(name) is not None:
            return attachment.read(self.module, name)  # a bias that is a site of its own, tied elsewhere
        return self.module._parameters.get(name)

    def _tied(self, name: str) -> Any:
        stored = self._stored(name)
        return stored if self._standing is None else self._standing.tensor(name, stored, self.op)

    @property
    def weight(self) -> Tensor:
        return self.op.matrix(dense(self._tied("weight"), self.module))

    @property
    def bias(self) -> Tensor | None:
        return self._tied("bias")

    def __call__(self, x: Tensor) -> Tensor:
        if self._standing is None:
            return self._call(x)
        y = self._standing.output(BaseLayer(self.module, self.op, self._call), x)
        return self._natural(x, self._tied("weight"), self.bias) if y is None else y

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # A bias that a change gives a layer without one is in the precision of what trains.
        bias = bias if bias is None else bias.to(weight.dtype)
        return self._natural(x, self.op.restore(weight, logical_shape(self._stored("weight"))), bias)

    def _natural(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = self.op.apply(self.module, x, weight, bias)
        if y is not None:
            return y
        overrides = self.module.finegraft.overrides
        overrides["weight"] = weight
        own_bias = "bias" in self.module._parameters
        if own_bias:
            overrides["bias"] = bias
        try:
            y = self._call(x)
        finally:
            overrides.clear()
        return y if own_bias or bias is None else y + self.op.on_channels(bias, y)

    def row_norms(self) -> Tensor:
        with torch.no_grad():
            return channel_norms(precise(self.op.matrix(dense(self._stored("weight"), self.module))), self.op)


class ChangedLayer:
    """The layer that one change makes of the layer beneath."""

    bare = False

    def __init__(self, slot: Slot, below: Any) -> None:
        self._slot, self._below = slot, below
        self.op, self.module = below.op, below.module

    @property
    def states(self) -> States | None:
        found: States | None = self._below.states
        return found

    @property
    def weight(self) -> Tensor:
        delta, p = self._slot.acting()
        return delta.weight(p, self._below.weight)

    @property
    def bias(self) -> Tensor | None:
        delta, p = self._slot.acting()
        return delta.bias_over(p, self._below.bias, lambda: self._below.weight)

    def __call__(self, x: Tensor) -> Tensor:
        delta, p = self._slot.acting()
        if delta.mergeable and _has_own_forward(self.module, self.op):
            return self._below.apply(x, self.weight, self.bias)
        return delta.forward(p, self._below, x)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._below.apply(x, weight, bias)

    def row_norms(self) -> Tensor:
        with torch.no_grad():
            delta, p = self._slot.acting()
            return delta.row_norms(p, self._below)


class ScaledLayer:
    """``below + scale * (changed - below)``: what a graft at a scale other than one makes of a layer."""

    bare = False

    def __init__(self, slots: Sequence[Slot], below: Any, scale: float) -> None:
        self._slots, self._below, self._scale = slots, below, scale
        self.op, self.module = below.op, below.module

    @property
    def states(self) -> States | None:
        found: States | None = self._below.states
        return found

    @property
    def weight(self) -> Tensor:
        return torch.lerp(self._below.weight, stacked(self._slots, self._below).weight, self._scale)

    @property
    def bias(self) -> Tensor | None:
        return blend(self._below.bias, stacked(self._slots, self._below).bias, self._scale)

    def __call__(self, x: Tensor) -> Tensor:
        remembered = _Remembered(self._below, x)
        y = stacked(self._slots, remembered)(x)
        return remembered.y + self._scale * (y - remembered.y)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._below.apply(x, weight, bias)

    def row_norms(self) -> Tensor:
        with torch.no_grad():
            return channel_norms(precise(self.weight), self.op)


class _Remembered:
    """A layer whose output for one input is computed once."""

    def __init__(self, below: Any, x: Tensor) -> None:
        self._below, self._x = below, x
        self.op, self.module = below.op, below.module
        self.y = below(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)

    def __call__(self, x: Tensor) -> Tensor:
        return self.y if x is self._x else self._below(x)


def _has_own_forward(module: Any, op: Op) -> bool:
    """Whether only a change of the weight is sure to mean what it says, as in a subclass with a forward of its own.

    Quantised layers are such subclasses too, but hold no floating-point weight that could be changed. Norms, whatever
    their class, end in gain and bias.
    """
    weight = module._parameters.get("weight")
    return weight is not None and weight.is_floating_point() and op.type != "norm" and not plain(module)


def stacked(slots: Sequence[Slot], below: Any) -> Any:
    """The layer that changes make of the layer beneath, the first being innermost."""
    for slot in slots:
        below = ChangedLayer(slot, below)
    return below


def blend(before: Tensor | None, after: Tensor | None, scale: float) -> Tensor | None:
    """``before + scale * (after - before)``, where a missing bias counts as zeros."""
    if after is None or before is None:
        return after if after is None else after * scale
    return before + scale * (after - before)
