"""Low-rank factors of saved grafts, for changes that start in what these have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.low_rank import LowRank
from finegraft.errors import RecipeError, SiteError
from finegraft.grafting.choosing import Planned
from finegraft.grafting.load import open_on
from finegraft.grafting.slot import Slot
from finegraft.grafting.stack import Stack

Factors = tuple[Tensor, Tensor]


def with_sources(planned: Sequence[Planned], stack: Stack) -> list[Planned]:
    """The changes, each with the factors that the grafts which its kinds name have at its site.

    Raises:
        StoreError, BaseMismatch: a graft that cannot be put on this base.
        RecipeError: a graft with a change at such a site that has no two narrow factors.
        SiteError: a graft without a change at such a site.
    """
    named = [dict.fromkeys(path for delta in change.deltas for path in delta.sources) for change in planned]
    found = {path: _changes(path, stack) for path in dict.fromkeys(path for own in named for path in own)}
    return [
        change._replace(site=replace(change.site, sources=_factors_at(change, own, found))) if own else change
        for change, own in zip(planned, named, strict=True)
    ]


def _changes(path: str, stack: Stack) -> dict[str, list[Slot]]:
    changes: dict[str, list[Slot]] = {}
    for site, slots in open_on(path, stack).slots:
        changes.setdefault(site.name, []).extend(slots)
    return changes


def _factors_at(
    change: Planned, paths: dict[str, None], found: dict[str, dict[str, list[Slot]]]
) -> tuple[Factors, ...]:
    factors: list[Factors] = []
    for path in paths:
        if not (slots := found[path].get(change.site.name)):
            raise SiteError(
                f"the graft at {path} changes nothing at {change.site.name!r}; it has changes at "
                f"{', '.join(sorted(found[path])[:4])}: name the same sites in where:, or other grafts"
            )
        factors += [_factors(slot, path) for slot in slots]
    return tuple(factors)


@torch.no_grad()
def _factors(slot: Slot, path: str) -> Factors:
    """``A`` and ``B`` of the change as it acts."""
    if isinstance(slot.delta, LowRank):
        a, b = slot.delta.joined(slot)
        return a, slot.delta.scale * b
    if isinstance(slot.delta, Factored):
        return slot.delta.factors(slot)
    raise RecipeError(
        f"the graft at {path} changes {slot.site!r} by kind {slot.delta.kind!r}, which has no low-rank factors to "
        "start from: give grafts of low-rank kinds, such as those of method 'lora'"
    )
