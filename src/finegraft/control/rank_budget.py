"""A budget of ranks that shrinks while a graft trains, shared out among all of its changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from finegraft.control import sensitivity
from finegraft.control.controller import Controller
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.grafting.moving import set_trainable
from finegraft.grafting.ranks import set_ranks
from finegraft.grafting.slot import Slot
from finegraft.registry import controllers

Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


@controllers.register("rank-budget")
class RankBudget(Controller):
    """Lets fewer and fewer ranks act, those on which the loss depends most (AdaLoRA, Zhang et al. 2023,
    arXiv:2303.10512).

    With ``I = |p * gradient|`` of every trained number, a number's score is its smoothed importance times its smoothed
    deviation from that; a rank's score is the sum, over the tensors of its change, of its numbers' mean. The budget
    stays at all ranks ``b0`` for a while, then falls along ``b1 + (b0 - b1) (1 - t)^power`` to ``b1``. Every so many
    steps the smallest tensor of a change (``m`` of ``three-factor``) is set to zero at all ranks but the best, over all
    sites; these may come back, as everything goes on to train. When the budget has reached its end the ranks that are
    left out are removed, with their optimizer state, and the others train on. A site may lose all of its ranks.

    It acts on kinds of which all rank-wise tensors train, and each counts ranks along one axis.

    Attributes:
        keep: share of all ranks that is left at the end.
        warmup: share of all steps before the budget falls.
        final: share of all steps, at the end, in which it no longer changes.
        every: steps from one choice to the next.
        power: of the schedule; 3 is AdaLoRA's, 1 is linear.
        mean_decay: of the smoothed importance.
        spread_decay: of the smoothed deviation.
    """

    kind = "rank-budget"

    keep: Annotated[float, Field(gt=0, le=1)] = 2 / 3
    warmup: Share = 0.1
    final: Share = 0.45
    every: PositiveInt = 10
    power: PositiveFloat = 3.0
    mean_decay: Decay = 0.85
    spread_decay: Decay = 0.85

    @model_validator(mode="after")
    def _leaves_time(self) -> RankBudget:
        if self.warmup + self.final >= 1:
            raise ValueError(f"warmup {self.warmup:g} and final {self.final:g} leave no step in which the budget falls")
        return self

    def budget(self, step: int, total_steps: int, ranks: int) -> int:
        """Ranks that act after some steps, of so many at the start.

        Args:
            step: finished steps.
            total_steps: of the whole training.
            ranks: at the start, over all sites.
        """
        least = max(1, round(self.keep * ranks))
        first, last = self._begin(total_steps), self._end(total_steps)
        if step <= first:
            return ranks
        if step >= last:
            return least
        return int(least + (ranks - least) * (1 - (step - first) / (last - first)) ** self.power)

    def _begin(self, total_steps: int) -> int:
        return min(round(self.warmup * total_steps), self._end(total_steps) - 1)

    def _end(self, total_steps: int) -> int:
        """The step after which ranks are removed."""
        return max(1, total_steps - round(self.final * total_steps))

    def start(self, run: Run) -> None:
        if not ranked(run):
            raise RecipeError(
                f"control {self.kind!r} drops ranks of changes such as three-factor and low-rank; recipe "
                f"{run.graft.recipe.name!r} has none whose ranks can be dropped"
            )
        run.memory["ranks"] = sum(slot.delta.rank for slot in ranked(run))

    def before_update(self, run: Run) -> None:
        if run.step + 1 >= self._end(run.total_steps):
            return
        for slot in ranked(run):
            for name in slot.delta.rank_axes:
                parameter = getattr(slot, name)
                if parameter.grad is not None:
                    importance = (parameter.detach() * parameter.grad).abs()
                    sensitivity.note(run, f"{slot.key}/{name}", importance, self.mean_decay, self.spread_decay)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        first, last = self._begin(run.total_steps), self._end(run.total_steps)
        if run.step == last:
            self._remove(run)
        elif first < run.step < last and run.step % self.every == 0:
            for slot, acts in self._acting(run).items():
                smallest, axis = _smallest(slot)
                shape = [1] * smallest.ndim
                shape[axis] = -1
                smallest.masked_fill_(~acts.view(shape), 0.0)

    def finish(self, run: Run) -> None:
        if run.step < self._end(run.total_steps):
            self._remove(run)

    def _acting(self, run: Run) -> dict[Slot, Bool[Tensor, " rank"]]:
        """Which ranks of each change are in the budget of now."""
        slots = ranked(run)
        scores = torch.cat([rank_scores(run, slot).cpu() for slot in slots])
        count = self.budget(run.step, run.total_steps, run.memory["ranks"])
        acts = torch.zeros(len(scores), dtype=torch.bool)
        acts[scores.argsort(descending=True, stable=True)[:count]] = True
        parts = acts.split([slot.delta.rank for slot in slots])
        return {slot: part.to(_smallest(slot)[0].device) for slot, part in zip(slots, parts, strict=True)}

    def _remove(self, run: Run) -> None:
        for slot, acts in self._acting(run).items():
            set_ranks(run.graft, slot, acts.nonzero().flatten(), optimizer=run.optimizer)
            if not bool(acts.any()):
                set_trainable(run.graft, [slot], False, run.optimizer)
        sensitivity.forget(run)


def ranked(run: Run) -> list[Slot]:
    """Changes of which any rank can go: all that counts ranks trains, each tensor along one axis."""
    return [slot for slot in run.graft.all_slots if slot.delta.rank_axes and _droppable(slot)]


def _droppable(slot: Slot) -> bool:
    axes: Mapping[str, tuple[int, ...]] = slot.delta.rank_axes
    own = dict(slot.named_parameters())
    return all(name in own and len(along) == 1 for name, along in axes.items()) and not set(axes) & set(slot.sharing)


def _smallest(slot: Slot) -> tuple[Tensor, int]:
    """The rank-wise tensor with the fewest numbers, and the axis that counts ranks."""
    name = min(slot.delta.rank_axes, key=lambda name: getattr(slot, name).numel())
    return getattr(slot, name), slot.delta.rank_axes[name][0]


def rank_scores(run: Run, slot: Slot) -> Float[Tensor, " rank"]:
    """The score of each rank of a change; zero before any gradient."""
    total = _smallest(slot)[0].new_zeros(slot.delta.rank)
    for name, (axis,) in slot.delta.rank_axes.items():
        found = sensitivity.score(run, f"{slot.key}/{name}")
        if found is not None:
            total = total + found.movedim(axis, 0).flatten(1).mean(1) if found.ndim > 1 else total + found
    return total
