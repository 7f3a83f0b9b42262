"""From a saved graft and its base to a graft in force."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from torch import Tensor, nn

from finegraft.deltas.delta import Delta
from finegraft.deltas.replacement import Replacement
from finegraft.errors import BaseMismatch, FinegraftError, SiteError, StoreError
from finegraft.grafting.attach import place
from finegraft.grafting.chain import Chain
from finegraft.grafting.graft import Graft
from finegraft.grafting.leading_ranks import sizes_of
from finegraft.grafting.peers import with_peers
from finegraft.grafting.results import to_changes
from finegraft.grafting.slot import Slot, changes_nothing, checked_slot
from finegraft.grafting.stack import Stack, bare, stack_of
from finegraft.grafting.starting import untouched
from finegraft.locate.collection import Sites
from finegraft.locate.find import exactly, sites
from finegraft.locate.site import Site
from finegraft.recipe import Recipe
from finegraft.recipe.spec import explain
from finegraft.select.drawing import drawn_units
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
    model = bare(model)
    stack = stack_of(model) or Stack(model)
    opened = open_on(path, stack)
    for _, (slot,) in opened.slots:
        slot.requires_grad_(trainable)
    return place(stack, opened.recipe, opened.manifest.seed, opened.slots)


class Opened(NamedTuple):
    """A saved graft, held against a base.

    Attributes:
        manifest: what it says of itself.
        recipe: what it was made by.
        slots: its changes, one by one, with their sites on the base.
    """

    manifest: Manifest
    recipe: Recipe
    slots: list[tuple[Site, list[Slot]]]


def open_on(path: str | Path, stack: Stack) -> Opened:
    """Read a saved graft for a base, and check it, without putting it there; see :func:`load`."""
    model = stack.model
    if _HUB_ID.fullmatch(str(path)) and not os.path.exists(path):
        path = pull(str(path))
    tensors, manifest = read(path)
    if not manifest.sites:
        raise StoreError(f"{path}: the graft changes nothing, its manifest lists no sites")
    recipe = _recipe(manifest)
    check(manifest.fingerprint, stack.base)
    found = _sites(model, recipe)
    own = _by_slot(tensors)
    slots: list[tuple[Site, list[Slot]]] = []
    common: dict[tuple[tuple[int, int], str, str], Tensor] = {}
    entries = [_entry(entry, recipe, found) for entry in manifest.sites]
    peers = with_peers((where, site) for site, _, where in entries)
    for entry, site, (_, delta, where) in zip(manifest.sites, peers, entries, strict=True):
        values = own.pop(f"{site.name}/{where[0]}.{where[1]}", {})
        if entry.get("drawn", False) is not False:
            values = _with_drawn(values, manifest, recipe, site, where[0])
        for name, label in delta.sharing(site).items():
            if name in values:
                common.setdefault((where, name, label), values[name])
            if (where, name, label) in common:
                values = values | {name: common[where, name, label]}
        site, slot = checked_slot(delta, untouched(site), where, values, stack.working)
        site = replace(site, before=None)
        to_changes(slot, _results(entry), site, _chain(stack, site))
        slots.append((site, [slot]))
    if own:
        raise StoreError(f"{path}: tensors belong to no change that the manifest lists: {sorted(own)[:4]}")
    if changes_nothing((site, slot) for site, (slot,) in slots):
        raise StoreError(
            f"{path}: the graft changes nothing, all its changes are zero, as in one saved before it was trained"
        )
    return Opened(manifest, recipe, slots)


def _recipe(manifest: Manifest) -> Recipe:
    try:
        return Recipe.parse(manifest.recipe)
    except FinegraftError as error:
        raise StoreError(f"the saved recipe cannot be used here: {error}") from None


def _sites(model: nn.Module, recipe: Recipe) -> Sites:
    """The model's sites under the recipe's roles, which a saved graft gives by whole names.

    Patterns are refused: one from a file could keep the matcher busy for ever.
    """
    found = sites(model)
    if not recipe.roles:
        return found
    known = {exactly(site.name) for site in found}
    if strange := next((pattern for pattern in recipe.roles if pattern not in known), None):
        raise StoreError(f"the saved roles should name layers of this model in full; {strange[:80]!r} does not")
    try:
        return sites(model, roles=recipe.roles)
    except SiteError as error:
        raise StoreError(f"the saved roles cannot be used here: {error}") from None


def _by_slot(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.rpartition("/")
        grouped.setdefault(key, {})[name] = tensor
    return grouped


def _with_drawn(
    values: dict[str, Tensor], manifest: Manifest, recipe: Recipe, site: Site, part: int
) -> dict[str, Tensor]:
    """The tensors of a change with its units drawn again."""
    select = recipe.parts[part].select if part < len(recipe.parts) else None
    drawn = None if select is None else drawn_units(site, select, manifest.seed, part)
    if drawn is None or "index" in values:
        raise StoreError(
            f"{site.name!r}: the manifest says that the seed draws its units; the recipe or the file does not"
        )
    return values | {"index": drawn}


def _chain(stack: Stack, site: Site) -> Chain | None:
    """What stands at a site already."""
    return next((p.chain for graft in stack.grafts for p in graft.placements if p.site.name == site.name), None)


def _results(entry: Mapping[str, Any]) -> list[str]:
    names = entry.get("results", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StoreError(f"the manifest's entry {str(dict(entry))[:200]} has no list of names under 'results'")
    return names


def _resized(delta: Delta, entry: Mapping[str, Any]) -> Delta:
    """A change with the rank that it has in the file."""
    if (sizes := entry.get("sizes")) is None:
        return delta
    if not isinstance(sizes, dict) or set(sizes) != set(sizes_of(delta)):
        raise StoreError(f"the manifest gives {sizes!r} as the sizes of a change of kind {delta.kind!r}")
    try:
        return type(delta).model_validate({**delta.model_dump(), **sizes})
    except ValidationError as error:
        raise StoreError(explain(error, f"the manifest's size of {entry.get('site')!r}")) from None


def _entry(entry: Mapping[str, Any], recipe: Recipe, found: Sites) -> tuple[Site, Delta, tuple[int, int]]:
    try:
        name, part, position, kind = entry["site"], entry["part"], entry["position"], entry["kind"]
        if not isinstance(name, str) or any(type(number) is not int or number < 0 for number in (part, position)):
            raise TypeError
        delta = Replacement() if part == len(recipe.parts) else recipe.parts[part].changes[position]
    except (KeyError, IndexError, TypeError):
        raise StoreError(f"the manifest's entry {dict(entry)} fits no part of its recipe") from None
    if delta.kind != kind:
        raise StoreError(f"the manifest says kind {kind!r} for {name!r}; its recipe says {delta.kind!r}")
    if name not in found:
        raise BaseMismatch(f"the graft changes {name!r}, which this model does not have")
    site = found[name]
    delta = _resized(delta.at(site), entry).folded()
    try:
        delta.fits(site)
    except SiteError as error:
        raise StoreError(f"the graft does not fit this model: {error}") from None
    return site, delta, (part, position)
