"""Changes at other ranks than they were made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finegraft.deltas.delta import Delta
from finegraft.errors import StoreError

SIZES = ("rank", "alpha")
"""Settings of a change that follow its rank, so that they differ from site to site where ranks were moved."""

IN_STATE = "sizes"
"""Under this name a checkpoint has them, as numbers, of a change whose ranks are not the recipe's."""


def sizes_of(delta: Delta) -> dict[str, Any]:
    """What of a change's settings follows its rank; empty for kinds without ranks."""
    return {name: getattr(delta, name) for name in SIZES if name in type(delta).model_fields and delta.rank_axes}


def sizes_in(state: Mapping[str, Tensor], made: Mapping[Any, Delta]) -> dict[Any, Delta]:
    """Changes as they are in a state, by slot, where their ranks are not those of now.

    Args:
        state: of :meth:`Graft.state`.
        made: slots of kinds with ranks, with the changes as the recipe makes them.

    Raises:
        StoreError: a rank that is none, or that a change cannot get back.
    """
    found = {}
    for slot, delta in made.items():
        now, given = sizes_of(slot.delta), state.get(f"{slot.key}/{IN_STATE}")
        if given is not None:
            if given.shape != (len(now),) or not bool(given.isfinite().all()) or not 0 <= float(given[0]) < 2**31:
                raise StoreError(f"{slot.key!r}: the state gives {given.tolist()} for {', '.join(now)}")
            count, *rest = given.tolist()
            delta = _with(delta, dict(zip(now, (int(count), *rest), strict=True)))
        rank: Any = sizes_of(delta)["rank"]
        if rank > now["rank"] and (lost := sorted(set(delta.rank_axes) - dict(slot.named_parameters()).keys())):
            raise StoreError(f"{slot.key!r}: the state has {rank} ranks; of {lost[0]!r} only {now['rank']} are left")
        if sizes_of(delta) != now:
            found[slot] = delta
    return found


def resize_to(slot: Any, delta: Any, state: Mapping[str, Tensor]) -> None:
    """Make a slot one of another rank; what trains comes from a state, what is kept loses its last ranks."""
    tensors = {}
    for name, axes in slot.delta.rank_axes.items():
        tensor = state.get(f"{slot.key}/{name}")
        if tensor is None:
            tensor = getattr(slot, name)
            for axis in axes:
                tensor = tensor.narrow(axis, 0, delta.rank)
        tensors[name] = tensor
    slot.resize(delta, tensors)


def at_rank(delta: Any, rank: int, *, same_scale: bool = False) -> Any:
    """A change at another rank, otherwise alike.

    Args:
        delta: of a kind with ranks.
        rank: how many; 0 where none is left.
        same_scale: fit ``alpha`` such that each rank acts as before; else the scale follows from alpha and rank.
    """
    settings: dict[str, Any] = {"rank": rank}
    if same_scale and rank and delta.rank and hasattr(delta, "alpha"):
        root = 0.5 if getattr(delta, "scaling", "alpha/r") == "alpha/sqrt(r)" else 1.0
        settings["alpha"] = delta.alpha * (rank / delta.rank) ** root
    return _with(delta, settings)


def _with(delta: Any, settings: Mapping[str, Any]) -> Any:
    """A change with other settings, unchecked, and without what was computed from its own."""
    other = delta.model_copy(update=settings)
    for name in set(vars(other)) - set(type(other).model_fields):
        del vars(other)[name]
    return other


class Leading:
    """The tensors of a change with its leading ranks alone.

    Args:
        slot: the change's tensors.
        axes: along which they count ranks, by name.
        rank: how many ranks.
        last_only: whether only the last of these gets a gradient.
    """

    def __init__(self, slot: Any, axes: dict[str, tuple[int, ...]], rank: int, *, last_only: bool) -> None:
        self._slot, self._axes, self._rank, self._last_only = slot, axes, rank, last_only

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._slot, name)
        axes = self._axes.get(name, ())
        for axis in axes:
            found = found.narrow(axis, 0, self._rank)
        return _last_of(found, axes) if axes and self._last_only and found.requires_grad else found


def _last_of(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The same numbers, of which only those of the last rank have a gradient."""
    last = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
    for axis in axes:
        last.narrow(axis, -1, 1).fill_(True)
    return torch.where(last, tensor, tensor.detach())
