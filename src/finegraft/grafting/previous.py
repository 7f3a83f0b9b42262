"""Starting from a former graft: its tensors take the place of fresh ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from finegraft.errors import BaseMismatch, RecipeError
from finegraft.grafting.graft import Graft
from finegraft.grafting.slot import Slot
from finegraft.locate.site import Site
from finegraft.store import Fingerprint, read

Former = dict[tuple[str, str], list[dict[str, Tensor]]]
"""Tensors of the changes of a graft, in their order, by site and kind."""


@torch.no_grad()
def start_from(previous: Graft | str | Path, slots: Sequence[tuple[Site, Sequence[Slot]]], base: Fingerprint) -> None:
    """Give changes the tensors of those of the same kind at the same site in a former graft; others stay fresh.

    Args:
        previous: a graft on a model, or the folder of a saved one. Its base may hold other values, but has the same
            architecture.
        slots: the new changes, site by site.
        base: fingerprint of their base.

    Raises:
        BaseMismatch: a base of another architecture.
        RecipeError: nothing in common, other shapes, or changes of chosen units; nothing is changed then.
    """
    former, theirs = _former(previous)
    if theirs.structure != base.structure:
        raise BaseMismatch(f"the former graft was made for a base of another architecture: {theirs}, not {base}")
    taken: list[tuple[Tensor, Tensor]] = []
    for site, own in slots:
        for slot in own:
            if found := former.get((site.name, slot.delta.kind)):
                taken += _pairs(slot, found.pop(0))
    if not taken:
        raise RecipeError(
            "the former graft has no change of the same kind at any of these sites, so nothing starts there"
        )
    for tensor, given in taken:
        tensor.copy_(given)


def _former(previous: Graft | str | Path) -> tuple[Former, Fingerprint]:
    former: Former = {}
    if isinstance(previous, Graft):
        for slot in previous.all_slots:
            held = {name: tensor.detach() for name, tensor in slot.tensors() if name not in slot.borrowed}
            former.setdefault((slot.site, slot.delta.kind), []).append(held)
        return former, previous.fingerprint
    tensors, manifest = read(previous)
    for entry in manifest.sites:
        prefix = f"{entry['site']}/{entry['part']}.{entry['position']}/"
        if entry.get("results"):
            raise RecipeError(f"the former graft at {previous} trains in place, so it gives no start: load it instead")
        held = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        former.setdefault((str(entry["site"]), str(entry["kind"])), []).append(held)
    return former, manifest.fingerprint


def _pairs(slot: Slot, found: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    if slot.delta.needs_selection:
        raise RecipeError(f"kind {slot.delta.kind!r} trains chosen units, which a former graft does not start: load it")
    own = dict(slot.tensors())
    pairs = [(own[name], tensor) for name, tensor in slot.delta.loaded(found).items() if name in own]
    for tensor, given in pairs:
        if tensor.shape != given.shape:
            raise RecipeError(
                f"{slot.site!r}: the former graft has a tensor of shape {tuple(given.shape)} where this one has "
                f"{tuple(tensor.shape)}: give it the same settings, such as rank"
            )
    return pairs
