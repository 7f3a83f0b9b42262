"""What stands written in a module's tensors, as its forward must see it: with gradients for what trains there."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finegraft.deltas.in_place import tie
from finegraft.grafting.layers import blend
from finegraft.locate.ops import Op, plain

if TYPE_CHECKING:
    from finegraft.grafting.chain import Chain, Group, Written
    from finegraft.grafting.slot import Slot


class Home:
    """The very parameter into which was written, without keeping it alive."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = weakref.ref(parameter)

    def holds(self, parameter: Tensor | None) -> bool:
        """Whether it is this one, rather than one that took its place."""
        return self._parameter() is parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> Home:
        parameter = self._parameter()
        return self if parameter is None else Home(copy.deepcopy(parameter, memo))


class Standing:
    """The written changes of one module, for one pass.

    Args:
        chain: the chain that wrote them and keeps the originals.
        module: the module whose pass it is.
        away: whether the tensors that forward reads are not those that are kept up to date: under ``torch.compile``,
            which would carry a written copy of each tensor through its graph, and where a wrapper put others in their
            place (``fully_shard``). What trains is then put into copies as forward and backward need them.
        names: of the tensors, those that the changes reach; a tied alias has a bias of its own.
    """

    def __init__(self, chain: Chain, module: Any, *, away: bool, names: tuple[str, ...] = ("weight", "bias")) -> None:
        self._chain, self._module, self._away, self._names = chain, module, away, names
        trains = [place for place, written in enumerate(chain.written) if written.trains]
        self._trains = trains if away or torch.is_grad_enabled() else []

    @property
    def acts(self) -> bool:
        """Whether forward must do anything but read the tensors."""
        return bool(self._trains)

    def tensor(self, name: str, stored: Any, op: Op) -> Any:
        """A stored tensor in its natural shape, holding and giving gradients to what trains in it.

        Args:
            name: ``weight`` (the site's main tensor, whatever it is called) or ``bias``.
            stored: what the module holds, or None.
            op: how the site computes.
        """
        if not self._trains or name not in self._names:
            return stored
        op = op if name == "weight" else _VECTOR
        return self._rebuilt(name, stored, op) if self._away else self._tied(name, stored, op)

    def _tied(self, name: str, tensor: Any, op: Op) -> Any:
        for place in self._trains if tensor is not None else ():
            written = self._chain.written[place]
            for slot in written.slots:
                for change in slot.delta.changes(slot):
                    if change.tensor == name and change.values.requires_grad:
                        tensor = tie(tensor, change.units, change.values, op, written.scale)
        return tensor

    def _rebuilt(self, name: str, stored: Any, op: Op) -> Any:
        """The tensor with originals put back from the lowest change that trains, and all from there on made again."""
        changing = self._chain.written[self._trains[0] :]
        if name == "weight":
            return op.restore(self._weight_over(stored, changing), stored.shape)
        matrix = self._beneath(name, stored, op)
        bias = None if matrix is None else matrix.squeeze(-1)
        for number, written in enumerate(changing):
            weight = partial(self._weight_over, self._module._parameters[self._chain.tensor], changing[:number])
            bias = changed_bias(written.group, bias, weight)
        return bias

    def _weight_over(self, stored: Any, changing: Sequence[Written]) -> Tensor:
        """The canonical matrix after these of the changes from the lowest that trains on."""
        matrix: Any = self._beneath(self._chain.tensor, stored, self._chain.op)
        for written in changing:
            matrix = changed_weight(written.group, matrix)
        return matrix

    def _beneath(self, tensor: str, stored: Any, op: Op) -> Tensor | None:
        """A stored tensor as a matrix, with what it held beneath the lowest change that trains."""
        matrix = None if stored is None else op.matrix(stored)
        for written in reversed(self._chain.written[self._trains[0] :]):
            for original in reversed(written.originals):
                if original.tensor == tensor:
                    kept = None if original.buffer is None else self._chain.get_buffer(original.buffer)
                    matrix = None if kept is None or matrix is None else original.units.put(matrix, kept)
        return matrix

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """The output of the layer by the one change's own fast way, or None where it has none.

        Args:
            layer: the base's layer as its tensors are.
            x: its input.
        """
        written = self._chain.written[self._trains[0]]
        if len(self._trains) != 1 or len(written.slots) != 1 or not plain(layer.module):
            return None
        if self._away and self._trains[0] != len(self._chain.written) - 1:
            return None
        originals = self._originals(written) if self._away else None
        (slot,) = written.slots
        return slot.delta.forward_written(slot, layer, x, written.scale, originals)

    def _originals(self, written: Written) -> list[Tensor]:
        return [self._chain.get_buffer(original.buffer or "") for original in written.originals]


class _Vector(Op):
    """A bias as an ``(out, 1)`` matrix."""


_VECTOR = _Vector()


def changed_weight(group: Group, w: Tensor) -> Tensor:
    """The canonical weight beneath a group made into the one above it."""
    changed = w
    for slot in group.slots:
        delta, p = slot.acting()
        changed = delta.weight(p, changed)
    return changed if group.scale == 1 else w + group.scale * (changed - w)


def changed_bias(group: Group, b: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
    """The bias beneath a group made into the one above it, given how to get the canonical weight beneath."""
    changed = b
    for slot in group.slots:
        changed = slot.delta.bias_over(slot, changed, weight)
        weight = partial(_over, slot, weight)
    return changed if group.scale == 1 else blend(b, changed, group.scale)


def _over(slot: Slot, weight: Callable[[], Tensor]) -> Tensor:
    changed: Tensor = slot.delta.weight(slot, weight())
    return changed
