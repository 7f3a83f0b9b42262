"""Training in which a drawn number of leading ranks acts, so that all of them serve later."""

from __future__ import annotations

import torch
from pydantic import PositiveInt

from finegraft.control.controller import Controller
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.grafting.slot import Slot
from finegraft.registry import controllers


@controllers.register("nested-ranks")
class NestedRanks(Controller):
    """In each step draws ``b``, and lets only the first ``b`` ranks of every change act (DyLoRA, Valipour et al. 2023,
    arXiv:2210.07558).

    The factor of a change follows from ``b``, as ``alpha / b``. ``fg.truncate`` gives the
    graft at any of these ranks afterwards. Outside of steps and in evaluation all ranks act.

    Attributes:
        least: smallest number drawn.
        last_only: let only the last of the ranks that act learn, as in the authors' training; else all of them do.
    """

    kind = "nested-ranks"

    least: PositiveInt = 1
    last_only: bool = True

    def start(self, run: Run) -> None:
        largest = max((slot.delta.rank for slot in _ranked(run)), default=0)
        if largest < self.least:
            raise RecipeError(
                f"control {self.kind!r} draws ranks from {self.least} up; recipe {run.graft.recipe.name!r} has "
                f"changes of up to {largest} ranks"
            )

    def before_step(self, run: Run) -> None:
        slots = _ranked(run)
        largest = max(slot.delta.rank for slot in slots)
        drawn = int(torch.randint(self.least, largest + 1, (), generator=run.rng(self.kind)))
        for slot in slots:
            slot.leading, slot.last_only = min(drawn, slot.delta.rank), self.last_only

    def after_step(self, run: Run) -> None:
        for slot in _ranked(run):
            slot.leading = None

    def finish(self, run: Run) -> None:
        self.after_step(run)


def _ranked(run: Run) -> list[Slot]:
    return [slot for slot in run.graft.all_slots if slot.delta.rank_axes]
