"""All grafts on one model, in order, and which of them are in force where."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finegraft.deltas.delta import Delta
from finegraft.errors import NotMergeable, RecipeError, SiteError
from finegraft.grafting.attachment import (
    attachment_of,
    close_way,
    hold_statistics,
    let_go,
    release_statistics,
    take_hold,
    unguard,
    untap,
    untrace,
)
from finegraft.grafting.chain import Chain, Group
from finegraft.grafting.slot import Slot
from finegraft.grafting.splitting import Part, Split, sees_samples
from finegraft.grafting.working import Working
from finegraft.grafting.writing import forget, rewrite
from finegraft.locate.collection import Sites
from finegraft.locate.find import sites
from finegraft.locate.site import Site
from finegraft.quantised.stored import check_writable
from finegraft.store import Fingerprint, fingerprint

if TYPE_CHECKING:
    from finegraft.grafting.graft import Graft

_KEY = "_finegraft_stack"


@dataclass(frozen=True)
class Placement:
    """One graft's changes at one site.

    Attributes:
        site: the site.
        chain: the chain at the site's own module.
        aliases: chains at other modules that hold the same tensor.
        slots: the changes, innermost first.
    """

    site: Site
    chain: Chain
    aliases: tuple[tuple[Chain, nn.Module], ...]
    slots: tuple[Slot, ...]


class Stack:
    """The grafts on a model, first attached first.

    Attributes:
        model: the model.
        grafts: grafts in the order in which they act.
        base: fingerprint of the base, taken before anything touched it; heads do not count.
        working: frozen tensors that its changes have in common.
    """

    def __init__(self, model: nn.Module) -> None:
        _refuse_parts(model)
        self.model = model
        self.grafts: list[Graft] = []
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.base: Fingerprint = fingerprint_of(model)
        self.working = Working()
        self.routes: tuple[tuple[Graft, ...], ...] = ()
        self._numbers = 0

    @property
    def next_number(self) -> int:
        """A number that no graft on the model has had."""
        self._numbers += 1
        return self._numbers - 1

    def groups_at(self, chain: Chain, grafts: Iterable[Graft]) -> list[Group]:
        """What the enabled ones of these grafts do at a chain."""
        groups = []
        for graft in grafts:
            slots = tuple(slot for slot in graft.slots_at(chain) if graft.has_part(slot.place[0]))
            if slots and graft.enabled:
                scale = graft.scale_at(slots[0].site) if all(slot.delta.scalable for slot in slots) else 1.0
                groups.append(Group(slots, scale, graft.merged))
        return groups

    def arrange(self, placements: Iterable[Placement]) -> None:
        """Bring the chains of these placements in line with the state of the grafts."""
        for placement in placements:
            chain = placement.chain
            groups = self.groups_at(chain, self.grafts)
            if self.routes:
                groups = [group for group in groups if group.merged]
            count = 0
            while count < len(groups) and groups[count].writable:
                count += 1
            if [w.group for w in chain.written] != groups[:count]:
                rewrite(chain, placement.site.module, groups[:count])
            routes = self._routes_at(chain)
            chain.take(groups[count:], routes, len(self.routes))
            for alias, _ in placement.aliases:
                weights = [(rows, _weights_only(own)) for rows, own in routes]
                alias.take(_weights_only(groups[count:]), weights, len(self.routes))

    def _routes_at(self, chain: Chain) -> list[tuple[tuple[int, ...], list[Group]]]:
        rows = self._rows().items()
        return [(own, [g for g in self.groups_at(chain, grafts) if not g.merged]) for grafts, own in rows]

    def check_compatible(self, site: Site, new: Iterable[Delta]) -> None:
        """Raise where a change that reads the weight beneath would lie on one that has none."""
        slots = [s for g in self.grafts for p in g.placements if p.site.name == site.name for s in p.slots]
        beneath = [slot.delta for slot in slots]
        for delta in new:
            blocker = next((b for b in beneath if not b.mergeable), None)
            if delta.reads_weight and blocker is not None:
                raise SiteError(
                    f"kind {delta.kind!r} cannot go on {site.name!r} above kind {blocker.kind!r}: it needs the weight "
                    f"beneath, and {blocker.kind!r} has none. Attach {delta.kind!r} first"
                )
            beneath.append(delta)

    def check_mergeable(self, graft: Graft) -> None:
        """Raise where a graft, or what lies beneath it, cannot stand in the base's tensors."""
        for placement in graft.placements:
            site, chain = placement.site, placement.chain
            check_writable(site.parameter, site.name)
            for slot in placement.slots:
                if not slot.delta.mergeable:
                    raise NotMergeable(
                        f"kind {slot.delta.kind!r} on {site.name!r} is no change of a weight: it cannot merge"
                    )
            adds = any(self._adds_bias(slot, site) for slot in placement.slots) if site.bias is None else False
            if adds and not site.op.holds_bias(site.module):
                raise NotMergeable(
                    f"{site.name!r} ({type(site.module).__name__}) cannot hold the bias this graft adds to it"
                )
            for other in self.grafts[: self.grafts.index(graft)]:
                in_way = other.slots_at(chain) if other.enabled and not other.merged else ()
                if any(not slot.delta.in_place for slot in in_way):
                    raise NotMergeable(
                        f"{other!r} lies beneath on {site.name!r} and is not merged: merge it first, or disable it"
                    )

    @staticmethod
    def _adds_bias(slot: Slot, site: Site) -> bool:
        return slot.delta.bias_over(slot, None, lambda: site.weight) is not None

    def add(self, graft: Graft) -> None:
        """Put a graft on top and in force; the first one freezes the base."""
        if not self.grafts:
            self.model.__dict__[_KEY] = self
            for name in self.flags:
                self.model.get_parameter(name).requires_grad_(False)
            hold_statistics(self.model)
        self.grafts.append(graft)
        self.arrange(graft.placements)

    def remove(self, graft: Graft) -> None:
        """Take a graft off; the last one to go gives the base back as it was."""
        place = self.grafts.index(graft)
        self.grafts.remove(graft)
        try:
            self.arrange(graft.placements)
        except BaseException:
            self.grafts.insert(place, graft)
            self.arrange(graft.placements)
            raise
        self._take_off(graft)

    def discard(self, graft: Graft) -> None:
        """Take off what there is of a graft that could not be put on."""
        if graft in self.grafts:
            self.grafts.remove(graft)
        self.arrange(graft.placements)
        self._take_off(graft)

    def _take_off(self, graft: Graft) -> None:
        for placement in graft.placements:
            take_off(self.model, placement)
        self._release_if_empty()

    def require_no_route(self) -> None:
        """Raise within a block of :func:`route`, whose routes rest on the state the grafts had at its start."""
        if self.routes:
            raise RecipeError("the batch is being routed: change, add, merge or copy grafts outside of the route block")

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        self.require_no_route()
        twin = object.__new__(Stack)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def make_permanent(self, merged: list[Graft]) -> None:
        """Forget the originals of merged grafts and take the grafts off; the base is what they made of it.

        Grafts that stay must lie above: their own writes are taken out first and made again on the new base.
        """
        staying = [graft for graft in self.grafts if graft not in merged]
        for chain, module in {id(p.chain): (p.chain, p.site.module) for g in merged for p in g.placements}.values():
            rewrite(chain, module, [w.group for w in chain.written if w.group.merged])
            forget(chain)
        self.grafts = staying
        for graft in merged:
            graft.merged = False
            for placement in graft.placements:
                take_off(self.model, placement)
        self.base = fingerprint_of(self.model)
        self.arrange(p for graft in staying for p in graft.placements)
        self._release_if_empty()

    def _release_if_empty(self) -> None:
        if self.grafts:
            return
        release_statistics(self.model)
        for name, parameter in self.model.named_parameters():
            if name in self.flags:
                parameter.requires_grad_(self.flags[name])
        self.model.__dict__.pop(_KEY, None)

    @contextmanager
    def routed(self, routes: tuple[tuple[Graft, ...], ...]) -> Iterator[None]:
        """Within this block, sample ``i`` of every batch goes through ``routes[i]``."""
        self.require_no_route()
        placements = [p for g in self.grafts for p in g.placements]
        if any(slot.sample_weights is not None for p in placements for slot in p.slots):
            raise RecipeError("the samples of the batch are weighed: leave the weigh block before routing them")
        self.routes = routes
        try:
            self.arrange(placements)
            parts = [Part(rows, partial(self._act, grafts)) for grafts, rows in self._rows().items()]
            whole = all(sees_samples(p.site) for grafts in routes for g in grafts for p in g.placements)
            take_hold(self.model).split = Split(() if whole else tuple(parts), len(routes))
            yield
        finally:
            self.routes = ()
            if (root := attachment_of(self.model)) is not None:
                root.split = None
                let_go(self.model)
            self.arrange(placements)

    def _act(self, grafts: tuple[Graft, ...]) -> None:
        """Let these grafts run in forward, for one part of a batch; nothing is written."""
        for placement in (p for g in self.grafts for p in g.placements):
            groups = [g for g in self.groups_at(placement.chain, grafts) if not g.merged]
            placement.chain.take(groups, [], 0)
            for alias, _ in placement.aliases:
                alias.take(_weights_only(groups), [], 0)

    def _rows(self) -> dict[tuple[Graft, ...], tuple[int, ...]]:
        rows: dict[tuple[Graft, ...], list[int]] = {}
        for row, grafts in enumerate(self.routes):
            rows.setdefault(grafts, []).append(row)
        return {grafts: tuple(own) for grafts, own in rows.items()}


def _weights_only(groups: Iterable[Group]) -> list[Group]:
    kept = [(tuple(slot for slot in g.slots if slot.delta.mergeable), g) for g in groups]
    return [Group(slots, g.scale, g.merged) for slots, g in kept if slots]


def take_off(model: nn.Module, placement: Placement) -> None:
    """Remove one graft's changes from its modules; a module that holds nothing more gets its class back."""
    modules = [(placement.chain, placement.site.module), *placement.aliases]
    for chain, module in modules:
        for name in [n for n, child in chain._modules.items() if child in placement.slots]:
            del chain._modules[name]
        attachment = attachment_of(module)
        if chain.slots or attachment is None:
            continue
        for name in [n for n, child in attachment._modules.items() if child is chain]:
            del attachment._modules[name]
            if name == "sublayer":
                attachment.ends = None
                untap(placement.site)
            if name == "input":
                close_way(placement.site)
            if name == "network":
                untrace(placement.site)
        let_go(module)
    unguard(model, placement.site.name)


def bare(model: Any) -> nn.Module:
    """The model itself, out of the wrapper of ``torch.compile``.

    Raises:
        RecipeError: no ``torch.nn.Module``, a scripted one, or one in a wrapper that must come after grafting.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise RecipeError(f"a graft goes on a torch.nn.Module in Python code, not on a {type(model).__name__}")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise RecipeError(f"graft the model first and wrap it in {type(model).__name__} then; its .module is the model")
    return model


def stack_of(model: nn.Module) -> Stack | None:
    """The grafts on a model, if it has any."""
    return bare(model).__dict__.get(_KEY)


def _refuse_parts(model: nn.Module) -> None:
    """Raise where a part of the model, or a larger model that it is a part of, carries grafts already."""
    for name, module in model.named_modules():
        if _KEY in module.__dict__:
            raise RecipeError(f"its part {name!r} carries grafts of its own: detach them, or graft that part again")
        if attachment_of(module) is not None:
            raise RecipeError(
                f"{name or 'it'!r} is part of a larger model that carries grafts: graft that model instead"
            )


def fingerprint_of(model: nn.Module, found: Sites | None = None) -> Fingerprint:
    """Fingerprint of a base, its classification heads left out: they are new wherever a graft travels."""
    found = sites(model) if found is None else found
    heads = {id(p) for site in found if site.role == "head" for p in (site.parameter, site.bias) if p is not None}
    return fingerprint((n, p) for n, p in model.named_parameters() if id(p) not in heads)
