"""Parts of a recipe that train one after the other, or in turns."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from finegraft.control.blocks import train_only
from finegraft.control.controller import Controller
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.recipe import Spec
from finegraft.registry import controllers


class Phase(Spec):
    """A stretch of training.

    Attributes:
        parts: numbers of the recipe's parts that train in it, counted from 0; None for all.
        share: its share of a cycle. Give this or ``steps``.
        steps: its length in steps.
    """

    parts: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    steps: PositiveInt | None = None


@controllers.register("phases")
class Phases(Controller):
    """Lets parts of the recipe train in turn; the others are frozen meanwhile (FPF and k-FPF, Zhao et al. 2023,
    arXiv:2304.04158, who end each cycle by training only the modules that forget most).

    What is frozen keeps its values, and has no gradient and no optimizer state. New heads always train.

    Attributes:
        phases: the stretches of a cycle in order, all by ``share`` (which add up to 1) or all by ``steps``.
        times: equal cycles in the whole training, of phases given by share; those given by steps recur to the end.
    """

    kind = "phases"
    freezes_sites = True

    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    times: Annotated[int, Field(gt=0, le=100_000)] = 1

    @model_validator(mode="after")
    def _fits(self) -> Phases:
        shares = [phase.share for phase in self.phases if phase.share is not None]
        steps = [phase.steps for phase in self.phases if phase.steps is not None]
        if len(shares) + len(steps) != len(self.phases) or (shares and steps):
            raise ValueError("every phase has a share, or every phase has steps")
        if shares and abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the shares of the phases add up to {sum(shares):g}, not to 1")
        if steps and self.times != 1:
            raise ValueError("times counts cycles of phases by share; phases by steps recur to the end of training")
        return self

    def current(self, step: int, total_steps: int) -> int:
        """The number of the phase that a step (counted from 0) belongs to, by which a loop may choose its data.

        Example:
            >>> fpf = Phases(phases=[{"share": 0.75}, {"share": 0.25, "parts": [1]}])
            >>> [("stream", "replay buffer")[fpf.current(step, 8)] for step in (0, 5, 6, 7)]
            ['stream', 'stream', 'replay buffer', 'replay buffer']
        """
        if self.phases[0].steps is not None:
            lengths: list[float] = [phase.steps or 0 for phase in self.phases]
            start, step = 0, step % int(sum(lengths))
        else:
            cycle = next((i for i in range(self.times) if step < self._end_of(i, total_steps)), self.times - 1)
            start, end = self._end_of(cycle - 1, total_steps), self._end_of(cycle, total_steps)
            lengths = [(phase.share or 0) * (end - start) for phase in self.phases]
        ends = [start + round(sum(lengths[: i + 1])) for i in range(len(lengths))]
        return next((i for i, end in enumerate(ends) if step < end), len(ends) - 1)

    def _end_of(self, cycle: int, total_steps: int) -> int:
        return (cycle + 1) * total_steps // self.times

    def before_step(self, run: Run) -> None:
        parts = len(run.graft.recipe.parts)
        wrong = [part for phase in self.phases for part in phase.parts or () if part >= parts]
        if wrong:
            raise RecipeError(
                f"control {self.kind!r}: there is no part {wrong[0]}; the recipe has parts 0 to {parts - 1}"
            )
        wanted = self.phases[self.current(run.step, run.total_steps)].parts
        own = [slot for slot in run.graft.all_slots if slot.place[0] < parts]
        train_only(run, [slot for slot in own if wanted is None or slot.place[0] in wanted], own)

    def finish(self, run: Run) -> None:
        train_only(run, run.graft.all_slots, run.graft.all_slots)
