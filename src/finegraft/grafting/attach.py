"""Putting changes with their tensors onto a model."""

from __future__ import annotations

from collections.abc import Sequence

from finegraft.grafting.attachment import chain_at, guard, tap
from finegraft.grafting.attention import stand_in_between
from finegraft.grafting.chain import Chain
from finegraft.grafting.graft import Graft
from finegraft.grafting.slot import Slot
from finegraft.grafting.stack import Placement, Stack, take_off
from finegraft.locate.site import Site
from finegraft.recipe import Recipe


def place(stack: Stack, recipe: Recipe, seed: int, slots: Sequence[tuple[Site, Sequence[Slot]]]) -> Graft:
    """A graft of these changes, put on top of the stack and in force. On failure the model is as before."""
    number = stack.next_number
    by_site: dict[str, tuple[Site, list[Slot]]] = {}
    for site, own in slots:
        by_site.setdefault(site.name, (site, []))[1].extend(own)
    placements: list[Placement] = []
    try:
        for site, own in by_site.values():
            placements.append(_placement(site, own, number))
            guard(stack.model, site.name)
    except BaseException:
        for placement in placements:
            take_off(stack.model, placement)
        raise
    graft = Graft(stack, recipe, seed=seed, placements=placements)
    stack.add(graft)
    return graft


def _placement(site: Site, slots: Sequence[Slot], number: int) -> Placement:
    chain = chain_at(site, site.module, site.tensor)
    _register(chain, slots, number)
    aliases = []
    for _, module, tensor in site.aliases:
        alias = chain_at(site, module, tensor, owner=(chain, site.module))
        _register(alias, slots, number)
        aliases.append((alias, module))
    if site.kind == "attention":
        stand_in_between()
    if site.kind == "sublayer":
        tap(site)
    return Placement(site, chain, tuple(aliases), tuple(slots))


def _register(chain: Chain, slots: Sequence[Slot], number: int) -> None:
    for slot in slots:
        slot.train(chain.training)
        chain.add_module(f"{number}_{slot.place[0]}_{slot.place[1]}", slot)
