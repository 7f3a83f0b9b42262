"""Ranks of changes: dropped, added, truncated; the optimizer's state goes with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim import Optimizer

from finegraft.deltas.delta import Delta
from finegraft.errors import RecipeError
from finegraft.grafting.arguments import require_graft
from finegraft.grafting.graft import Graft
from finegraft.grafting.leading_ranks import at_rank
from finegraft.grafting.slot import Slot
from finegraft.grafting.stack import stack_of
from finegraft.locate.site import Site


@torch.no_grad()
def set_ranks(
    graft: Graft,
    slot: Slot,
    kept: Int[Tensor, " kept"],
    *,
    added: int = 0,
    rng: torch.Generator | None = None,
    same_scale: bool = True,
    optimizer: Optimizer | None = None,
) -> None:
    """Let a change have some of its ranks, and new ones after them.

    What stays keeps its values and its optimizer state, bit for bit. New ranks start as the kind draws them, with zeros
    for optimizer state. Each ``nn.Parameter`` stays the same object with other data; its gradient is dropped. A change
    of no rank is zero, and in no file.

    Args:
        graft: the graft.
        slot: one of its changes, of a kind with ranks.
        kept: sorted numbers of the ranks that stay.
        added: number of new ones.
        rng: for the start of new ones.
        same_scale: keep the factor at which each rank acts; else it follows from the recipe's ``alpha`` and the rank.
        optimizer: the optimizer of the graft. State that has numbers, but not the shape of its tensor, starts afresh.

    Raises:
        RecipeError: a kind without ranks, ranks that it does not have, or a graft in a state in which nothing can be
            moved; nothing is changed then.
        SiteError: more ranks than the site can have; nothing is changed then.
    """
    site = graft.placement_of(slot).site
    _require_movable(graft, slot)
    kept = kept.to(next(slot.parameters()).device)
    count = slot.delta.rank
    if not torch.equal(kept, kept.unique()) or (len(kept) and not 0 <= int(kept[0]) <= int(kept[-1]) < count):
        raise RecipeError(f"{slot.key!r} has ranks 0 to {count - 1}; those to keep are sorted numbers of them")
    if follows_from_base(slot, site) and (added or not _leading(kept)):
        raise RecipeError(f"{slot.key!r}: not all of its ranks' tensors train: only the last ranks can be dropped")
    delta = at_rank(slot.delta if same_scale else graft.as_made(slot), len(kept) + added, same_scale=same_scale)
    start: dict[str, Tensor] = {}
    if added:
        delta.fits(site)
        start = delta.initial(site, rng or torch.Generator())
    axes_of = slot.delta.rank_axes
    moved = {name: _resized(getattr(slot, name), axes, kept, added, start.get(name)) for name, axes in axes_of.items()}
    moved |= _from_base(slot, site, delta, moved)
    for name in moved if optimizer is not None else ():
        _move_state(optimizer, getattr(slot, name), axes_of[name], kept, added)  # type: ignore[arg-type]
    slot.resize(delta, moved)


def truncate(graft: Graft, rank: int, *, optimizer: Optimizer | None = None) -> Graft:
    """Cut every change of a graft that has ranks down to its first ones, for good; the graft is returned.

    The factor of a change follows from its settings at the new rank, as ``alpha / rank``. So a graft trained by
    ``dylora`` serves at every rank up to its own. New heads and kinds without ranks stay as they are.

    Args:
        graft: an attached graft, not merged.
        rank: ranks to keep of each change; changes that have fewer keep all.
        optimizer: the optimizer of the graft, to train on with; its state goes with the ranks.

    Raises:
        RecipeError: no graft, no change has ranks, a rank below 1, or a merged graft; nothing is changed then.

    Example:
        >>> import finegraft as fg
        >>> from torch import nn
        >>> graft = fg.graft(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), "lora", rank=2, heads="none")
        >>> fg.truncate(graft, 1).num_trainable
        26
    """
    before = _as_they_are(_to_truncate(graft, rank))
    known: Any = {} if optimizer is None else optimizer.state
    states = {parameter: dict(known[parameter]) for parameter in graft.parameters() if parameter in known}
    try:
        for slot, _, _ in before:
            set_ranks(graft, slot, torch.arange(rank), same_scale=False, optimizer=optimizer)
    except BaseException:
        _put_back(before)
        known.update(states)
        raise
    return graft


@contextmanager
def truncated(graft: Graft, rank: int) -> Iterator[Graft]:
    """Within this block a graft has only the first ranks of its changes, to be evaluated or saved: :func:`truncate`.

    It is not for training: an optimizer's state stays that of all ranks. A graft that is merged within the block has
    all ranks merged after it; :func:`finegraft.merge` is for good.

    Raises:
        RecipeError: as :func:`truncate`.
    """
    before = _as_they_are(_to_truncate(graft, rank))
    try:
        yield truncate(graft, rank)
    finally:
        if merged := graft.merged:
            graft.unmerge()
        _put_back(before)
        if merged:
            graft.merge()


def follows_from_base(slot: Slot, site: Site) -> bool:
    """Whether some of a change's ranks do not train, but follow from the base or its start: only the last can go."""
    return not set(slot.delta.rank_axes) <= set(slot.delta.shapes(site))


def _as_they_are(slots: Iterable[Slot]) -> list[tuple[Slot, Delta, dict[str, Tensor]]]:
    return [(slot, slot.delta, {n: getattr(slot, n).detach() for n in slot.delta.rank_axes}) for slot in slots]


def _put_back(before: Iterable[tuple[Slot, Delta, dict[str, Tensor]]]) -> None:
    for slot, delta, tensors in before:
        slot.resize(delta, tensors)


def _from_base(slot: Slot, site: Site, delta: Delta, cut: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that follow from the base at the new rank, as loading will make them: the first of those before."""
    if not follows_from_base(slot, site):
        return {}
    found = {name: tensor for name, tensor in delta.working(site).items() if name in cut}
    for name, tensor in found.items():
        known = cut[name]
        if not torch.allclose(tensor.to(known), known, rtol=1e-3, atol=1e-4 * float(known.abs().max())):
            raise RecipeError(
                f"{slot.key!r}: kind {delta.kind!r} approximates the parts of a large weight, and finds others at "
                "another rank: its ranks cannot be truncated here"
            )
    return found


def _leading(kept: Tensor) -> bool:
    return len(kept) > 0 and int(kept[-1]) == len(kept) - 1


def _to_truncate(graft: Graft, rank: int) -> list[Slot]:
    require_graft(graft, "truncate")
    if type(rank) is not int or rank < 1:
        raise RecipeError(f"a rank is a whole number of at least 1, not {rank!r}")
    ranked = [slot for slot in graft.all_slots if slot.delta.rank_axes]
    if not ranked:
        kinds = ", ".join(sorted({slot.delta.kind for slot in graft.all_slots}))
        raise RecipeError(f"{graft!r} has no ranks to cut: its kinds are {kinds}")
    for slot in ranked:
        _require_movable(graft, slot)
    return [slot for slot in ranked if slot.delta.rank > rank]


def _require_movable(graft: Graft, slot: Slot) -> None:
    stack = stack_of(graft.model)
    assert stack is not None  # an attached graft is on one
    stack.require_no_route()
    axes = slot.delta.rank_axes
    if graft.merged:
        raise RecipeError("the graft is merged: call unmerge() before its ranks change")
    if not axes:
        raise RecipeError(f"kind {slot.delta.kind!r} on {slot.site!r} has no ranks to keep, drop or add")
    if set(axes) & set(slot.sharing):
        raise RecipeError(f"kind {slot.delta.kind!r} shares its ranks among sites: they cannot change at {slot.site!r}")
    if split := [name for name in axes if type(getattr(slot, name).data) is not Tensor]:
        raise RecipeError(f"{slot.key!r}: {split[0]!r} is split over processes; ranks change where a process has all")


def _resized(tensor: Tensor, axes: tuple[int, ...], kept: Tensor, added: int, start: Tensor | None) -> Tensor:
    """Kept ranks of a tensor, then new ones: those of ``start``, which has the new shape, or zeros."""
    found = tensor.detach()
    for axis in axes:
        found = found.index_select(axis, kept)
    if not added:
        return found.contiguous()
    shape = list(tensor.shape)
    for axis in axes:
        shape[axis] = len(kept) + added
    result = tensor.new_zeros(shape) if start is None else start.to(tensor.device, tensor.dtype, copy=True)
    old = result
    for axis in axes:
        old = old.narrow(axis, 0, len(kept))
    old.copy_(found)
    return result


def _move_state(optimizer: Optimizer, parameter: Tensor, axes: tuple[int, ...], kept: Tensor, added: int) -> None:
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    numbers = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.ndim}
    if any(value.shape != parameter.shape for value in numbers.values()):
        del optimizer.state[parameter]
    elif state:
        moved = {name: _resized(value, axes, kept, added, None) for name, value in numbers.items()}
        optimizer.state[parameter].update(moved)
