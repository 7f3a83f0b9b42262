"""All changes at one site, in order, and what of them stands written in the base's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.deltas.delta import channel_norms
from finegraft.deltas.states import States
from finegraft.grafting.layers import BaseLayer, ScaledLayer, stacked
from finegraft.grafting.slot import Slot
from finegraft.grafting.standing import Home, Standing, changed_weight
from finegraft.locate.ops import Op
from finegraft.select.units import Units


@dataclass(frozen=True)
class Group:
    """One graft's changes at a site, acting at one scale.

    Attributes:
        slots: the changes, innermost first.
        scale: 1 is the graft as trained, 0 the base, -1 its negation.
        merged: whether it was asked to stand in the base's tensors.
    """

    slots: tuple[Slot, ...]
    scale: float
    merged: bool

    @property
    def in_place(self) -> bool:
        """Whether all of its values can train inside the base's tensors."""
        return all(slot.delta.in_place for slot in self.slots)

    @property
    def writable(self) -> bool:
        """Whether it belongs in the base's tensors: merged, or trained there."""
        return self.merged or self.in_place

    def over(self, below: Any) -> Any:
        """The layer function this group makes of the one beneath."""
        return stacked(self.slots, below) if self.scale == 1 else ScaledLayer(self.slots, below, self.scale)

    def over_alias(self, below: Any) -> Any:
        """The same on a module that shares the tensor: it takes the changes of the weight only, its bias is its own."""
        bias = below.bias
        same = (s.delta.bias_over(s, bias, lambda: below.weight) is bias for s in self.slots)
        whole = all(type(s.op) is type(below.op) for s in self.slots) and all(same)
        return self.over(below) if whole else SharedWeightLayer(self, below)


@dataclass(frozen=True)
class Original:
    """What a write replaced: the values of some units of one stored tensor, kept as a buffer of the chain."""

    tensor: str
    units: Units
    buffer: str | None


@dataclass(frozen=True)
class Written:
    """A group that stands in the base's tensors.

    Attributes:
        group: the group.
        originals: what to put back, in the order of writing.
        trains: whether gradients must reach its values.
        versions: counts of in-place changes of the values at the time of writing.
    """

    group: Group
    originals: tuple[Original, ...] = ()
    trains: bool = False
    versions: tuple[int, ...] = field(default=())

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.group.slots

    @property
    def scale(self) -> float:
        return self.group.scale


class SharedWeightLayer:
    """A layer that reads a tied tensor for a purpose of its own, such as a language model's output layer."""

    bare = False

    def __init__(self, group: Group, below: Any) -> None:
        self._group, self._below = group, below
        self.op, self.module = below.op, below.module

    @property
    def weight(self) -> Tensor:
        return changed_weight(self._group, self._below.weight)

    @property
    def bias(self) -> Tensor | None:
        return self._below.bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._below.apply(x, self.weight, self.bias)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._below.apply(x, weight, bias)

    def row_norms(self) -> Tensor:
        with torch.no_grad():
            return channel_norms(self.weight.float(), self.op)


class Computed:
    """A function whose value is there already: what a sublayer gave, or a stack with the states of its blocks."""

    def __init__(self, y: Tensor, states: States | None = None) -> None:
        self._y, self.states = y, states

    def __call__(self, x: Tensor) -> Tensor:
        return self._y

    def of_rows(self, index: Tensor) -> Computed:
        """The same for some rows of the batch."""
        return Computed(self._y.index_select(0, index))


class Chain(nn.Module):
    """The changes of one tensor or layer, or of an alias that shares its tensor.

    Args:
        tensor: name of the main stored tensor (``weight``, or a bare tensor's name).
        op: how the site computes.
        owner: for a tied alias, the chain and the module of the primary site, where alone is written.
    """

    def __init__(self, tensor: str, op: Op, owner: tuple[Chain, nn.Module] | None = None) -> None:
        super().__init__()
        self.tensor, self.op, self._owner = tensor, op, owner
        self.groups: tuple[Group, ...] = ()
        self.written: tuple[Written, ...] = ()
        self.home: Home | None = None
        self.routes: tuple[tuple[tuple[int, ...], tuple[Group, ...]], ...] = ()
        self.samples = 0

    @property
    def slots(self) -> list[Slot]:
        """Every change registered here, active or not."""
        return [child for child in self.children() if isinstance(child, Slot)]

    def take(
        self, groups: Sequence[Group], routes: Sequence[tuple[Sequence[int], Sequence[Group]]], samples: int
    ) -> None:
        """What runs in forward from now on: the groups, or groups by rows of the batch."""
        routed = any(own for _, own in routes)
        self.groups = tuple(groups)
        self.routes = tuple((tuple(rows), tuple(own)) for rows, own in routes) if routed else ()
        self.samples = samples

    @property
    def written_here(self) -> tuple[Written, ...]:
        """What stands in the tensor, whoever wrote it."""
        return self.written if self._owner is None else self._owner[0].written

    @property
    def acts(self) -> bool:
        """Whether forward differs from the base's own, given what stands in the tensor."""
        return bool(self.groups or self.routes or any(w.trains for w in self.written_here))

    def writer(self, module: nn.Module) -> tuple[Chain, nn.Module]:
        """The chain and the module that hold what is written: these, but for a tied alias."""
        return self._owner or (self, module)

    def run(self, module: nn.Module, call: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        """The changed layer's output for input ``x``."""
        if self.routes:
            return self._routed(module, call, x)
        return self._through(self.groups, self._base(module, call))(x)

    def needed(self, x: Tensor) -> Tensor | None:
        """Which tokens of a sublayer's input the base must run on; None where on all."""
        if self.routes or not self.groups or self.groups[0].scale != 1 or x.ndim != 3:
            return None
        slot = self.groups[0].slots[0]
        found: Tensor | None = slot.delta.needed(slot, x)
        return found

    def away(self, module: Any) -> bool:
        """Whether forward reads other tensors than those that are kept up to date; see :class:`Standing`."""
        if torch.compiler.is_compiling():
            return True
        home = self.writer(module)[0].home
        return home is not None and not home.holds(module._parameters[self.tensor])

    def _standing(self, module: nn.Module) -> Standing | None:
        writer, _ = self.writer(module)
        if not any(written.trains for written in writer.written):
            return None
        names = ("weight", "bias") if self._owner is None else ("weight",)
        return Standing(writer, module, away=self.away(module), names=names)

    def _base(self, module: nn.Module, call: Callable[[Tensor], Any]) -> BaseLayer:
        return BaseLayer(module, self.op, call, self._standing(module))

    def _through(self, groups: tuple[Group, ...], layer: Any) -> Any:
        for group in groups:
            layer = group.over(layer) if self._owner is None else group.over_alias(layer)
        return layer

    def _routed(self, module: nn.Module, call: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        if x.shape[0] % self.samples:
            x = x.expand(self.samples, *x.shape[1:])
        repeat = x.shape[0] // self.samples  # layers that flatten samples and tokens see tokens in sample order
        y: Any = None
        for rows, groups in self.routes:
            index = torch.tensor(rows, device=x.device)
            if repeat > 1:
                index = (index.unsqueeze(-1) * repeat + torch.arange(repeat, device=x.device)).flatten()
            picked = call.of_rows(index) if isinstance(call, Computed) else call
            part = self._through(groups, self._base(module, picked))(x.index_select(0, index))
            y = part.new_zeros(x.shape[0], *part.shape[1:]) if y is None else y
            y = y.index_copy(0, index, part)
        return y

    def effective(self, module: nn.Module) -> Tensor:
        """The bare tensor as the base's code should see it, in its natural shape."""
        stored: Any = module._parameters[self.tensor]
        standing = self._standing(module)
        tensor = stored if standing is None else standing.tensor("weight", stored, self.op)
        if not self.groups:
            return tensor
        w = self.op.matrix(tensor)
        for group in self.groups:
            w = changed_weight(group, w)
        return self.op.restore(w, stored.shape)
