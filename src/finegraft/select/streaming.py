"""Scores of units, made while gradients stream by, in memory of the units rather than of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.recipe import Select
from finegraft.registry import scores
from finegraft.select.statistics import measure

Sums = Callable[[Site, Tensor], Tensor]
Take = Callable[[Site, Tensor], None]

ROOM = 64 * 2**20
"""Bytes that statistics of entries may always take up, on models whose largest block is smaller."""


def stream(
    model: nn.Module | None,
    sites: Sequence[Site],
    select: Select,
    batches: Sequence[Any],
    *,
    rng: Callable[[Site], torch.Generator],
    sums: Sums,
    take: Take,
) -> None:
    """``take(site, scores)`` gets the scores of each site's units once, as soon as they are known, in any order.

    What is alive at a time is one layer's gradient beside sums over units. Only where entries are scored over several
    batches must a statistic of each entry be kept; sites then take turns, each turn a pass over the batches, so that no
    more is kept than the largest block of the model or 64 MiB, whichever is more.

    Args:
        model: asked for where the score needs a statistic.
        sites: where.
        select: the score and its settings.
        batches: calibration data.
        rng: generator of a site, for scores that draw.
        sums: from a score for each entry of a site to one for each of its units.
        take: gets float32 scores (float64 on such weights).
    """
    score = scores[select.score]

    def units(site: Site, statistic: Tensor | None) -> Tensor:
        entries = score(site, select, rng(site), statistic)
        return sums(site, entries if entries.dtype == torch.float64 else entries.float())

    def finish(site: Site, found: Tensor) -> None:
        take(site, _finite(site, score.of_sums(found), select.score))

    if score.needs is None or model is None:
        for site in sites:
            finish(site, units(site, None))
    elif score.needs == "inputs":
        _by_inputs(model, sites, batches, lambda site, squares: finish(site, units(site, squares)))
    elif len(batches) == 1:
        _by_one_batch(model, sites, batches, score.needs, units, finish)
    elif score.additive and select.unit != "entry":
        _by_sums(model, sites, batches, score.needs, units, finish)
    else:
        for turn in _turns(sites):
            _by_entries(model, turn, batches, score.needs, units, finish)


def totals(model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], needs: str, take: Take) -> None:
    """``take(site, total)`` gets a statistic of each site over all batches once, in any order, and need not keep it.

    Gradients of a single batch come one by one, while backward runs. Otherwise sites take turns, each turn a pass over
    the batches, so that no more is kept than the statistics of the largest block, or 64 MiB, whichever is more.

    Args:
        model: the base.
        sites: where.
        batches: calibration data.
        needs: ``gradient``, summed over the batches; or ``covariance`` of inputs, the mean over samples, of which the
            first tensor of a batch has one in each row.
        take: gets float32 statistics (float64 on such weights).

    Raises:
        SiteError: a statistic is not finite.
    """
    of_gradient = needs == "gradient"
    kind = "signed" if of_gradient else needs
    samples = 1 if of_gradient else sum(map(_samples, batches))

    def finish(site: Site, total: Tensor) -> None:
        if not bool(total.isfinite().all()):
            raise SiteError(f"the {needs} on {site.name!r} is not a finite number everywhere")
        take(site, total)

    def size(site: Site) -> int:
        return _bytes(site) if of_gradient else _bytes(site) // site.fan_out * site.fan_in

    if of_gradient and len(batches) == 1:
        _by_one_batch(model, sites, batches, kind, lambda site, total: total, finish)
        return
    for turn in _turns(sites, size):
        found: dict[str, Tensor] = {}
        measure(model, turn, batches, kind, partial(_add, found))
        for site in turn:
            total = found.pop(site.name, None)
            finish(site, _nothing(site, needs) if total is None else total / samples)


def _samples(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else ()
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 1)


Units = Callable[[Site, Tensor], Tensor]


def _finite(site: Site, found: Tensor, score: str) -> Tensor:
    if not bool(found.isfinite().all()):
        raise SiteError(f"score {score!r} is not a finite number everywhere on {site.name!r}")
    return found


def _by_inputs(model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], finish: Take) -> None:
    squares: dict[str, Tensor] = {}
    measure(model, sites, batches, "inputs", lambda site, found: _add(squares, site, found))
    for site in sites:
        finish(site, squares.pop(site.name) if site.name in squares else site.weight.new_zeros(site.fan_in).float())


def _by_one_batch(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], needs: str, units: Units, finish: Take
) -> None:
    met = set()

    def take(site: Site, statistic: Tensor) -> None:
        met.add(site.name)
        finish(site, units(site, statistic))

    measure(model, sites, batches, needs, take)
    for site in sites:
        if site.name not in met:
            finish(site, units(site, _nothing(site)))


def _by_sums(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], needs: str, units: Units, finish: Take
) -> None:
    found: dict[str, Tensor] = {}
    measure(model, sites, batches, needs, lambda site, statistic: _add(found, site, units(site, statistic)))
    for site in sites:
        finish(site, found.pop(site.name) if site.name in found else units(site, _nothing(site)))


def _by_entries(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], needs: str, units: Units, finish: Take
) -> None:
    found: dict[str, Tensor] = {}
    measure(model, sites, batches, needs, lambda site, statistic: _add(found, site, statistic))
    for site in sites:
        finish(site, units(site, found.pop(site.name) if site.name in found else _nothing(site)))


def _add(found: dict[str, Tensor], site: Site, piece: Tensor) -> None:
    if site.name in found:
        found[site.name].add_(piece)
    else:
        found[site.name] = piece.clone()


def _nothing(site: Site, needs: str = "gradient") -> Tensor:
    """The statistic of a site that no loss depends on, or that no batch reaches."""
    shape = site.matrix_shape if needs != "covariance" else (site.fan_in, site.fan_in)
    return torch.zeros(shape, device=site.weight.device)


def _bytes(site: Site) -> int:
    return site.weight.numel() * (8 if site.weight.dtype == torch.float64 else 4)


def _turns(sites: Sequence[Site], size: Callable[[Site], int] = _bytes) -> list[list[Site]]:
    blocks: dict[str, int] = {}
    for site in sites:
        key = site.block or site.name
        blocks[key] = blocks.get(key, 0) + size(site)
    room = max(ROOM, *blocks.values())
    turns: list[list[Site]] = [[]]
    taken = 0
    for site in sites:
        if taken + size(site) > room:
            turns.append([])
            taken = 0
        turns[-1].append(site)
        taken += size(site)
    return turns
