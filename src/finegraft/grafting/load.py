"""From a saved graft and its base to a graft in force."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.deltas.delta import Delta
from finegraft.deltas.replacement import Replacement
from finegraft.errors import BaseMismatch, FinegraftError, StoreError
from finegraft.grafting.attach import place
from finegraft.grafting.graft import Graft
from finegraft.grafting.slot import Slot, checked_tensors
from finegraft.grafting.stack import Stack, stack_of
from finegraft.locate.collection import Sites
from finegraft.locate.find import sites
from finegraft.locate.site import Site
from finegraft.recipe import Recipe
from finegraft.store import Manifest, check, pull, read

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(path: str | Path, model: nn.Module, *, trainable: bool = False) -> Graft:
    """Put a saved graft on its base. It applies completely, or the model stays untouched and the error says why.

    Args:
        path: folder written by :meth:`Graft.save`, or the Hub id of one.
        model: the base the graft was made for, in any floating-point precision.
        trainable: whether its tensors take gradients, to train on.

    Raises:
        StoreError: a file that is missing, broken, tampered with or of a newer version, or a graft without effect.
        BaseMismatch: another base; both fingerprints are named.
    """
    if not Path(path).exists() and _HUB_ID.fullmatch(str(path)):
        path = pull(str(path))
    tensors, manifest = read(path)
    recipe = _recipe(manifest)
    stack = stack_of(model) or Stack(model)
    check(manifest.fingerprint, stack.base)
    found = sites(model, roles=recipe.roles)
    own = _by_slot(tensors)
    slots = []
    for entry in manifest.sites:
        site, delta, where = _entry(entry, recipe, found)
        key = f"{site.name}/{where[0]}.{where[1]}"
        values = own.pop(key, {})
        site = replace(site, chosen=values["index"]) if "index" in values else site
        stack.check_compatible(site, (delta,))
        slots.append((site, [Slot(delta, site, where, checked_tensors(delta, site, values))]))
    if own:
        raise StoreError(f"{path}: tensors belong to no change that the manifest lists: {sorted(own)[:4]}")
    _check_effect([(site, slot) for site, (slot,) in slots], path)
    for _, (slot,) in slots:
        slot.requires_grad_(trainable)
    return place(stack, recipe, manifest.seed, slots)


def _recipe(manifest: Manifest) -> Recipe:
    try:
        return Recipe.parse(manifest.recipe)
    except FinegraftError as error:
        raise StoreError(f"the saved recipe cannot be used here: {error}") from None


def _by_slot(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.rpartition("/")
        grouped.setdefault(key, {})[name] = tensor
    return grouped


def _entry(entry: Mapping[str, Any], recipe: Recipe, found: Sites) -> tuple[Site, Delta, tuple[int, int]]:
    try:
        name, part, position, kind = entry["site"], entry["part"], entry["position"], entry["kind"]
        delta = Replacement() if part == len(recipe.parts) else recipe.parts[part].what[position]
    except (KeyError, IndexError, TypeError):
        raise StoreError(f"the manifest's entry {dict(entry)} fits no part of its recipe") from None
    if delta.kind != kind:
        raise StoreError(f"the manifest says kind {kind!r} for {name!r}; its recipe says {delta.kind!r}")
    try:
        site = found[name]
    except (KeyError, FinegraftError):
        raise BaseMismatch(f"the graft changes {name!r}, which this model does not have") from None
    delta.fits(site)
    return site, delta, (part, position)


@torch.no_grad()
def _check_effect(slots: list[tuple[Site, Slot]], path: str | Path) -> None:
    changes = [(site, slot) for site, slot in slots if slot.delta.kind != "replacement"]
    if changes and not any(slot.delta.has_effect(slot, site) for site, slot in changes):
        raise StoreError(
            f"{path}: the graft changes nothing, all its changes are zero: it was saved before it was trained"
        )
