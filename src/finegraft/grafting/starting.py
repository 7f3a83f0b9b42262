"""Changes at their start: drawn, made of the base's own weights, of what calibration data say, or of a former graft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from finegraft.deltas.delta import Delta
from finegraft.errors import RecipeError
from finegraft.grafting.attachment import attachment_of
from finegraft.grafting.chain import Chain
from finegraft.grafting.choosing import Planned
from finegraft.grafting.slot import Slot, fresh_slot
from finegraft.grafting.stack import Stack
from finegraft.locate.site import Site
from finegraft.quantised.stored import dense
from finegraft.select.streaming import totals


class _Start(NamedTuple):
    """One change before it has tensors."""

    delta: Delta
    site: Site
    place: tuple[int, int]


def fresh_changes(
    planned: Sequence[Planned], model: nn.Module, stack: Stack, batches: Sequence[Any] | None, seed: int
) -> list[tuple[Site, list[Slot]]]:
    """Sites with their changes, in the order planned.

    A statistic of calibration batches is made into tensors as soon as it is known, and forgotten.

    Args:
        planned: sites and kinds.
        model: the base.
        stack: the grafts on it.
        batches: calibration data; None where none was given.
        seed: of the graft.

    Raises:
        RecipeError: a start that looks at data, and there are none.
        SiteError: data that say nothing of a site.
    """
    starts = [
        _Start(delta, change.site, (change.part, change.first + i))
        for change in planned
        for i, delta in enumerate(change.deltas)
    ]
    made: dict[tuple[str, tuple[int, int]], Slot] = {}

    def make(start: _Start, statistic: Tensor | None = None) -> None:
        site = replace(untouched(start.site), statistic=statistic)
        made[start.site.name, start.place] = fresh_slot(start.delta, site, start.place, seed, stack.working)

    for needs in ("covariance", "gradient"):
        waiting: dict[str, list[_Start]] = {}
        for start in starts:
            if start.delta.needs == needs:
                waiting.setdefault(start.site.name, []).append(start)
        if not waiting:
            continue

        def take(site: Site, statistic: Tensor, waiting: dict[str, list[_Start]] = waiting) -> None:
            for start in waiting[site.name]:
                make(start, statistic)

        found = [starts[0].site for starts in waiting.values()]
        totals(model, found, _given(batches, needs, waiting), needs, take)
    for start in starts:
        if start.delta.needs is None:
            make(start)
    places = [[(change.part, change.first + i) for i in range(len(change.deltas))] for change in planned]
    return [
        (change.site, [made[change.site.name, place] for place in own])
        for change, own in zip(planned, places, strict=True)
    ]


def untouched(site: Site) -> Site:
    """The site with a way to its tensor as the base had it, whatever stands written there."""
    chain = _chain(site)
    return site if chain is None or not chain.written else replace(site, before=lambda: _original(site, chain))


def _chain(site: Site) -> Chain | None:
    attachment = attachment_of(site.module) if site.kind in ("layer", "tensor") else None
    return None if attachment is None else attachment.chain("layer" if site.kind == "layer" else site.tensor)


def _original(site: Site, chain: Chain) -> Tensor:
    matrix = site.op.matrix(dense(site.module._parameters[site.tensor]).detach()).clone()
    for written in reversed(chain.written):
        for original in reversed(written.originals):
            if original.tensor == site.tensor and original.buffer is not None:
                original.units.write_(matrix, dense(chain.get_buffer(original.buffer)))
    tensor: Tensor = site.op.restore(matrix, site.shape)
    return tensor


def _given(batches: Sequence[Any] | None, needs: str, waiting: dict[str, list[_Start]]) -> Sequence[Any]:
    if batches is None:
        delta = next(iter(waiting.values()))[0].delta
        labels = " with labels" if needs == "gradient" else ""
        what = "the gradient of the loss" if needs == "gradient" else "the covariance of inputs"
        raise RecipeError(
            f"kind {delta.kind!r} starts from {what} here, which needs data: give calibration=, an iterable of "
            f"batches{labels}"
        )
    return batches
