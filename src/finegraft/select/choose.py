"""From scores and a budget to chosen units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.recipe import Select
from finegraft.registry import scores

_FAMILIES = {"attention": ("q", "k", "v", "o", "qkv"), "ffn": ("up", "gate", "down")}


def choose_units(
    site: Site, select: Select, rng: torch.Generator, gradient: Tensor | None = None
) -> Int[Tensor, " chosen"]:
    """Sorted indices of the units of one site that train (see ``Units`` for what they index).

    A row's or column's score is the sum over its entries.

    Raises:
        SiteError: the budget asks for more units than the site has.
    """
    entries = site.weight.numel()
    units = {"entry": entries, "row": entries // site.fan_in, "column": site.fan_in}[select.unit]
    wanted = _budget(site, select, units)
    if wanted > units:
        raise SiteError(f"{site.name!r} has {units} of unit {select.unit!r}; {wanted} were asked for")
    if select.score == "random":
        return torch.randperm(units, generator=rng)[:wanted].sort().values
    found = scores[select.score](site, select, rng, gradient)
    if select.unit == "column":
        found = found.reshape(-1, site.fan_in).sum(0)
    elif select.unit == "row":
        found = found.reshape(-1, site.fan_in).sum(1)
    return found.flatten().topk(wanted, largest=select.largest).indices.sort().values.cpu()


def _budget(site: Site, select: Select, units: int) -> int:
    if select.count is not None:
        return select.count
    if select.like_rank is not None:
        return min(select.like_rank * (site.fan_out + site.fan_in), units)
    return max(1, round((select.density or 0) * units))


def choose_sites(found: Sequence[Site], select: Select, rng: torch.Generator) -> list[Site]:
    """Whole sites, drawn within each block's attention and each block's FFN.

    Shares that are no whole number are made up over the blocks: half of three matrices is one, two, one, two ...

    Raises:
        SiteError: a score or budget that is not defined for modules.
    """
    if select.score != "random" or select.density is None:
        raise SiteError(f"unit 'module' takes score 'random' and a density; found score {select.score!r}")
    groups: dict[tuple[str, int | None], list[Site]] = {}
    for site in found:
        family = next((name for name, roles in _FAMILIES.items() if site.role in roles), site.role)
        groups.setdefault((family, site.layer), []).append(site)
    owed: dict[str, float] = {}
    chosen: list[Site] = []
    for (family, _), members in groups.items():
        exact = owed.get(family, 0.0) + select.density * len(members)
        take = int(exact + 1e-9)
        owed[family] = exact - take
        chosen += [members[i] for i in sorted(torch.randperm(len(members), generator=rng)[:take].tolist())]
    if not chosen:
        raise SiteError(f"density {select.density} of {len(found)} sites is less than one site")
    return chosen
