"""Frozen tensors that follow from a seed, drawn and held once for all sites where they are the same."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from finegraft.deltas.delta import Delta
from finegraft.locate.site import Site


class Working:
    """The working tensors of the changes on one model; they live as long as a change holds them."""

    def __init__(self) -> None:
        self._held: dict[Hashable, dict[str, weakref.ref[Tensor]]] = {}
        self._moves: list[tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = []

    def of(self, delta: Delta, site: Site, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The working tensors of a change at a site, where they are to be and in the precision of its trained ones."""
        own = delta.working_key(site)
        if own is None:
            return delta.working(site)
        key = (type(delta), delta, own, device, dtype)
        held = {name: tensor() for name, tensor in self._held.get(key, {}).items()}
        if held and all(tensor is not None for tensor in held.values()):
            return {name: tensor for name, tensor in held.items() if tensor is not None}
        drawn = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in delta.working(site).items()
        }
        self._held[key] = {name: weakref.ref(tensor) for name, tensor in drawn.items()}
        return drawn

    def moved(self, before: Tensor, after: Tensor) -> Tensor:
        """What ``before`` became where it was moved or cast first, rather than ``after``, another copy of the same."""
        if after is before:
            return after
        self._moves = [(old, new) for old, new in self._moves if old() is not None and new() is not None]
        for old, new in self._moves:
            known = new()
            if old() is before and known is not None and (known.device, known.dtype) == (after.device, after.dtype):
                return known
        self._moves.append((weakref.ref(before), weakref.ref(after)))
        return after

    def __reduce__(self) -> tuple[Any, ...]:
        return Working, ()  # copies of a model hold copies of the tensors, of which this knows nothing
