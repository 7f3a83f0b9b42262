"""What is lost where changes are merged into quantised weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch

from finegraft.grafting.stack import Placement
from finegraft.grafting.standing import changed_weight
from finegraft.quantised.stored import dense
from finegraft.quantised.tensor import QuantisedTensor


class Rounding(NamedTuple):
    """How far a quantised weight is from what was merged into it.

    Attributes:
        site: its name.
        share: the norm of the difference over that of the change.
        largest: the largest difference of an entry.
        bound: the most that the format allows; None where it does not say.
    """

    site: str
    share: float
    largest: float
    bound: float | None


@torch.no_grad()
def roundings(placements: Iterable[Placement]) -> list[Rounding]:
    """What rounding did at the sites with quantised weights, for the change that was merged there last."""
    found: list[Rounding] = []
    for placement in placements:
        site, chain = placement.site, placement.chain
        held = site.module._parameters.get(site.tensor) if site.tensor else None
        if not isinstance(held, QuantisedTensor) or not chain.written:
            continue
        last = chain.written[-1]
        buffer = next((o.buffer for o in last.originals if o.tensor == site.tensor and o.buffer), None)
        if buffer is None:
            continue
        before = dense(chain.get_buffer(buffer)).float()
        meant = changed_weight(last.group, before)
        lost, bound = held.dequantize().float() - meant, held.quantiser.bound(meant)
        share = float(lost.norm() / (meant - before).norm().clamp_min(torch.finfo(torch.float32).tiny))
        most = None if bound is None else float(bound.max())
        found.append(Rounding(site.name, share, float(lost.abs().max()), most))
    return found


def warn_of_rounding(placements: Iterable[Placement]) -> None:
    """Say how much of a merged change quantised weights could not hold, if there are any."""
    found = [rounding for rounding in roundings(placements) if rounding.largest > 0]
    if not found:
        return
    worst = max(found, key=lambda rounding: rounding.share)
    bound = "" if worst.bound is None else f" (the format allows {worst.bound:.2g})"
    warnings.warn(
        f"merged into {len(found)} quantised weights, which are rounded again: most is lost at {worst.site!r}, an "
        f"error of {worst.share:.0%} of the change, at most {worst.largest:.2g} in an entry{bound}. Unmerged, or on a "
        "dense base (fg.dequantise), nothing is lost",
        RuntimeWarning,
        stacklevel=3,
    )
