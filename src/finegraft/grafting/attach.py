"""Putting changes with their tensors onto a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from finegraft.grafting.attachment import chain_at, guard, open_way, tap, trace
from finegraft.grafting.attention import stand_in_between
from finegraft.grafting.chain import Chain
from finegraft.grafting.graft import Graft
from finegraft.grafting.slot import Slot, own_seed, unite
from finegraft.grafting.stack import Placement, Stack
from finegraft.locate.site import Site
from finegraft.recipe import Recipe


def place(stack: Stack, recipe: Recipe, seed: int, slots: Sequence[tuple[Site, Sequence[Slot]]]) -> Graft:
    """A graft of these changes, put on top of the stack and in force. On failure the model is as before."""
    by_site: dict[str, tuple[Site, list[Slot]]] = {}
    for site, own in slots:
        by_site.setdefault(site.name, (site, []))[1].extend(own)
        for slot in own:
            slot.seed = own_seed(seed, slot.site, slot.place)
    unite(slot for _, own in slots for slot in own)
    for site, own in by_site.values():
        stack.check_compatible(site, [slot.delta for slot in own])
    number = stack.next_number
    graft = Graft(stack, recipe, seed=seed, placements=[])
    try:
        for site, own in by_site.values():
            for placement in _placed(site, own, number):
                graft.placements[-1:] = [p for p in graft.placements[-1:] if p.site is not site] + [placement]
            guard(stack.model, site.name)
        stack.add(graft)
    except BaseException:
        stack.discard(graft)
        raise
    return graft


def _placed(site: Site, slots: Sequence[Slot], number: int) -> Iterator[Placement]:
    """The placement as it grows, so that what is there can be taken off again if the next step fails."""
    chain = chain_at(site, site.module, site.tensor)
    placement = Placement(site, chain, (), tuple(slots))
    yield placement
    _register(chain, slots, number)
    for _, module, tensor in site.aliases:
        alias = chain_at(site, module, tensor, owner=(chain, site.module))
        placement = replace(placement, aliases=(*placement.aliases, (alias, module)))
        yield placement
        _register(alias, slots, number)
    if site.kind == "attention":
        stand_in_between()
    if site.kind in ("sublayer", "block"):
        tap(site)
    if site.kind == "input":
        open_way(site)
    if site.kind == "network":
        trace(site, chain)


def _register(chain: Chain, slots: Sequence[Slot], number: int) -> None:
    for slot in slots:
        slot.train(chain.training)
        chain.add_module(f"{number}_{slot.place[0]}_{slot.place[1]}", slot)
