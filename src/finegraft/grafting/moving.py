"""What trains, moved while it trains: other units of a site, changes frozen and thawed, optimizer state with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Optimizer

from finegraft.errors import RecipeError
from finegraft.grafting.graft import Graft
from finegraft.grafting.slot import Slot
from finegraft.grafting.stack import Placement, stack_of
from finegraft.grafting.writing import refresh, trains
from finegraft.select.units import Units


@torch.no_grad()
def move(
    graft: Graft,
    slot: Slot,
    chosen: Int[Tensor, " chosen"],
    *,
    dropped: Literal["keep", "revert"],
    optimizer: Optimizer | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> None:
    """Let other units of a site train from now on.

    Units that go on training keep their values and their optimizer state, bit for bit. New ones start where they are:
    at the value at which they had settled, else at the base's own; their optimizer state is zero, or ``moments``. The
    ``nn.Parameter`` stays the same object with other data; its gradient is dropped.

    Args:
        graft: the graft.
        slot: one of its changes, of a kind that trains chosen units.
        chosen: sorted indices, int64, of the units that train from now on.
        dropped: units that no longer train settle at their values (``keep``), or go back to the base (``revert``).
        optimizer: the optimizer that holds ``slot.values``; its state of the shape of the values moves with them, and
            any other (a step count, sums over rows and columns) stays.
        moments: optimizer state of new units by its name, each of the shape of the new values; only what it says of
            new units is taken. Where the optimizer has no state yet, give every entry of it.

    Raises:
        RecipeError: a kind without chosen units, indices that do not fit, a tensor split over processes, moments of
            another shape; nothing is changed then.
    """
    _require_unrouted(graft)
    placement = graft.placement_of(slot)
    shape = placement.site.matrix_shape
    if not slot.delta.needs_selection:
        raise RecipeError(f"kind {slot.delta.kind!r} on {slot.site!r} trains no chosen units: there is nothing to move")
    old, settled = slot.delta.units(slot.index), slot.delta.units(slot.settled_index)
    new = slot.delta.units(chosen.to(old.index.device))
    moments = moments or {}
    _check(slot, new, shape, dropped, moments)
    stopped = _without(old.index, new.index) if dropped == "keep" else old.index[:0]
    kept = slot.delta.units(torch.cat([_without(settled.index, new.index), stopped]).sort().values)
    values, settled_values = (
        _carried(slot.values.detach(), old, units, shape, onto=_carried(slot.settled_values, settled, units, shape))
        for units in (new, kept)
    )
    moved = {} if optimizer is None else _moved_state(optimizer, slot.values, old, new, shape, moments)
    graft.put(
        slot,
        {"values": values, "index": new.index, "settled_index": kept.index, "settled_values": settled_values},
    )
    if optimizer is not None and moved:
        optimizer.state[slot.values].update(moved)


def set_trainable(
    graft: Graft,
    slots: Iterable[Slot],
    flag: bool,
    optimizer: Optimizer | None = None,
    *,
    only: Collection[str] | None = None,
) -> None:
    """Freeze or thaw changes; frozen ones stay in force and cost neither gradients nor saved activations.

    Args:
        graft: the graft.
        slots: changes of it.
        flag: whether they train from now on.
        optimizer: drops what it remembers of changes that are frozen here; thawed, they start afresh.
        only: names of the tensors to freeze or thaw; None for all of a change.

    Raises:
        RecipeError: a change of another graft; nothing is changed then.
    """
    _require_unrouted(graft)
    found = {slot: graft.placement_of(slot) for slot in slots}
    for slot, placement in found.items():
        refresh(placement.chain, placement.site.module)
        for name, parameter in slot.named_parameters():
            if only is not None and name not in only:
                continue
            parameter.requires_grad_(flag)
            if not flag:
                parameter.grad = None
                if optimizer is not None:
                    optimizer.state.pop(parameter, None)
    _note_what_trains(found.values())


@contextmanager
def held(graft: Graft) -> Iterator[None]:
    """Within this block nothing of the graft trains, and the base's tensors hold its present values.

    So the model's own weights can take gradients, as scores need them.
    """
    _require_unrouted(graft)
    flags = {p: p.requires_grad for p in graft.parameters()}
    for placement in graft.placements:
        refresh(placement.chain, placement.site.module)
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        _note_what_trains(graft.placements)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        _note_what_trains(graft.placements)


def _require_unrouted(graft: Graft) -> None:
    stack = stack_of(graft.model)
    assert stack is not None  # an attached graft is on one
    stack.require_no_route()


def _note_what_trains(placements: Iterable[Placement]) -> None:
    for placement in placements:
        chain = placement.chain
        away = chain.away(placement.site.module)  # then nothing is in the tensors, and all must go on being put there
        chain.written = tuple(replace(w, trains=trains(w.group) or (away and w.trains)) for w in chain.written)


def _check(slot: Slot, new: Units, shape: Sequence[int], dropped: str, moments: Mapping[str, Tensor]) -> None:
    if dropped not in ("keep", "revert"):
        raise RecipeError(f"dropped is 'keep' or 'revert', not {dropped!r}")
    if flaw := new.flaw(tuple(shape)):
        raise RecipeError(f"{slot.site!r}: the units chosen do not fit: {flaw}")
    if type(slot.values.data) is not Tensor:
        raise RecipeError(
            f"{slot.site!r}: its values are a {type(slot.values.data).__name__}, split over processes; units move only "
            "in training with a whole model in each process"
        )
    wanted = new.shape(tuple(shape))
    for name, tensor in moments.items():
        if tuple(tensor.shape) != tuple(wanted):
            raise RecipeError(f"{slot.site!r}: moments {name!r} are {tuple(tensor.shape)}; they must be {wanted}")


def _without(index: Tensor, other: Tensor) -> Tensor:
    """Members of one sorted list that are not in another."""
    return index[~torch.isin(index, other)]


def _carried(tensor: Tensor, old: Units, new: Units, shape: Sequence[int], *, onto: Tensor | None = None) -> Tensor:
    """Numbers at some units, put where others have them in common; what is new is zero, or as in ``onto``."""
    result = tensor.new_zeros(new.shape(tuple(shape))) if onto is None else onto
    if not tensor.numel() or not result.numel():
        return result
    place, found = _positions(old, new, shape)
    flat = result.reshape(-1)
    flat[found] = tensor.reshape(-1)[place[found]]
    return flat.view(result.shape)


def _positions(old: Units, new: Units, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For every number of the new units its place among those of the old ones, and whether it has one."""
    before, after = old.entries(tuple(shape)), new.entries(tuple(shape))
    ordered, order = before.sort()
    at = torch.searchsorted(ordered, after).clamp_(max=len(ordered) - 1)
    return order[at], ordered[at] == after


def _moved_state(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    old: Units,
    new: Units,
    shape: Sequence[int],
    moments: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What of an optimizer's state is one number for each of the parameter's, for the new units."""
    state = optimizer.state.get(parameter, {})
    own = {name: t for name, t in state.items() if isinstance(t, Tensor) and t.shape == parameter.shape}
    if state and (strange := sorted(set(moments) - set(own))):
        raise RecipeError(f"the optimizer keeps no {strange[0]!r} for each number; it keeps {sorted(own)}")
    start = {name: tensor.to(parameter.device, copy=True) for name, tensor in moments.items()}
    return start | {name: _carried(tensor, old, new, shape, onto=start.get(name)) for name, tensor in own.items()}
