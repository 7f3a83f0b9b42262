"""Sites that know which others have the same changes, for kinds that share tensors among them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace

from finegraft.locate.site import Site


def with_peers(sites: Iterable[tuple[Hashable, Site]]) -> list[Site]:
    """The sites in the same order, each with those of the same place in the recipe as its peers.

    Args:
        sites: places in the recipe, each with one of its sites.
    """
    given = list(sites)
    found: dict[Hashable, list[Site]] = {}
    for place, site in given:
        found.setdefault(place, []).append(site)
    peers = {place: tuple(own) for place, own in found.items()}
    return [replace(site, peers=peers[place]) for place, site in given]
