"""Sparse grafts on entries that are given rather than chosen by a score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from finegraft.deltas.replacement import Replacement
from finegraft.errors import SiteError
from finegraft.grafting import Graft
from finegraft.grafting.attach import place
from finegraft.grafting.slot import Slot, fresh_slot
from finegraft.grafting.stack import Stack, stack_of
from finegraft.locate import sites
from finegraft.locate.site import Site
from finegraft.recipe import Recipe
from finegraft.registry import kinds
from finegraft.select.units import Units


def graft_on_entries(
    model: nn.Module,
    entries: Mapping[str, Int[Tensor, " chosen"]],
    values: Mapping[str, Float[Tensor, " chosen"]] | None = None,
    *,
    name: str = "given-entries",
    heads: bool = False,
    lr: float = 1e-3,
    seed: int = 0,
    **about: Any,
) -> Graft:
    """A graft of kind ``sparse`` whose entries are given, such as those that an earlier training changed.

    Args:
        model: the base; it carries the graft afterwards.
        entries: for each site by name, sorted flat indices into its canonical matrix ``(*batch, out, in)``; sites
            without entries may be left out.
        values: what is added to these entries; zero by default.
        name: of the recipe.
        heads: whether classification heads belong to the graft, with the values that the model holds now.
        lr: the recipe's learning rate; default 1e-3.
        seed: what the graft says it was made from.
        **about: further fields of the recipe, such as ``source``.

    Raises:
        SiteError: a site that the model lacks, indices that do not fit it, or no entries at all.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> graft_on_entries(model, {"0": torch.tensor([1, 5])}).num_trainable
        2
    """
    found = sites(model)
    chosen = {site: index for site, index in entries.items() if len(index)}
    if not chosen:
        raise SiteError("there are no entries to put a graft on")
    delta, stack = kinds["sparse"](unit="entry"), stack_of(model) or Stack(model)
    slots: list[tuple[Site, list[Slot]]] = []
    for site_name, index in chosen.items():
        site = replace(found[site_name], chosen=index.to(torch.int64).cpu())
        if flaw := Units("entry", site.chosen).flaw(site.matrix_shape):
            raise SiteError(f"{site_name!r}: the entries do not fit: {flaw}")
        slot = fresh_slot(delta, site, (0, 0), seed, stack.working)
        if values is not None:
            with torch.no_grad():
                slot.get_parameter("values").copy_(values[site_name])
        slots.append((site, [slot]))
    if heads:
        slots += [
            (site, [_head(site, seed, stack)]) for site in found if site.role == "head" and site.parameter is not None
        ]
    total = sum(site.weight.numel() for site, _ in slots[: len(chosen)])
    share = max(sum(map(len, chosen.values())) / total, 1e-12)
    recipe = Recipe.parse(
        {
            "name": name,
            "parts": [
                {
                    "where": {"name": list(chosen)},
                    "what": {"kind": "sparse"},
                    "select": {"unit": "entry", "density": share, "scope": "model"},
                }
            ],
            "heads": "auto" if heads else "none",
            "train": {"lr": lr},
            **about,
        }
    )
    return place(stack, recipe, seed, slots)


def _head(site: Site, seed: int, stack: Stack) -> Slot:
    return fresh_slot(Replacement(), site, (1, 0), seed, stack.working)
