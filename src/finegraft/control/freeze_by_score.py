"""Tensors that stop to train, one after the other, when their gradients have settled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from finegraft.control import sensitivity
from finegraft.control.controller import Controller
from finegraft.control.rank_budget import Decay, Share
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.grafting.moving import set_trainable
from finegraft.grafting.slot import Slot
from finegraft.registry import controllers


@controllers.register("freeze-by-score")
class FreezeByScore(Controller):
    """Freezes tensors of some names by and by, for good, and all of them in the end (AFLoRA, Liu et al. 2024,
    arXiv:2403.13269).

    A number's score is its smoothed absolute gradient times its smoothed deviation from that, taken up as the mean over
    a window of steps. The share of numbers below the threshold rises from 0, after ``warmup``, along ``1 - (1 - t)^3``
    to 1 at the beginning of ``final``; a tensor whose mean score is below the threshold is frozen. It then has neither
    gradient nor optimizer state.

    Attributes:
        tensors: names of the tensors, at every change.
        warmup: share of all steps in which everything trains.
        final: share of all steps, at the end, in which none of the tensors does.
        window: steps from one look to the next.
        mean_decay: of the smoothed gradient.
        spread_decay: of the smoothed deviation.
    """

    kind = "freeze-by-score"

    tensors: Annotated[tuple[str, ...], Field(min_length=1)] = ("a", "b")
    warmup: Share = 0.05
    final: Share = 0.7
    window: PositiveInt = 10
    mean_decay: Decay = 0.85
    spread_decay: Decay = 0.95

    @model_validator(mode="after")
    def _leaves_time(self) -> FreezeByScore:
        if self.warmup + self.final >= 1:
            raise ValueError(f"warmup {self.warmup:g} and final {self.final:g} leave no step in which tensors freeze")
        return self

    def frozen_share(self, step: int, total_steps: int) -> float:
        """The share of numbers whose score is below the threshold after some steps."""
        last = max(1, total_steps - round(self.final * total_steps))
        first = min(round(self.warmup * total_steps), last - 1)
        passed = min(1.0, max(0.0, (step - first) / (last - first)))
        return 1 - (1 - passed) ** 3

    def start(self, run: Run) -> None:
        freezing = {id(parameter) for _, _, _, parameter in self._tensors(run)}
        if not freezing:
            raise RecipeError(f"control {self.kind!r}: nothing that trains is named {' or '.join(self.tensors)}")
        if self.final and freezing >= {id(parameter) for parameter in run.graft.parameters()}:
            raise RecipeError(
                f"control {self.kind!r}: nothing trains but tensors named {' or '.join(self.tensors)}, and in the last "
                f"{self.final:g} of all steps they are frozen: leave some out, or set final: 0"
            )
        run.memory["frozen"] = []

    def before_update(self, run: Run) -> None:
        for key, _, _, parameter in self._training(run):
            if parameter.grad is not None:
                gone = run.memory.get(f"window/{key}")
                size = parameter.grad.detach().abs()
                run.memory[f"window/{key}"] = size if gone is None else gone + size

    def after_step(self, run: Run) -> None:
        share = self.frozen_share(run.step, run.total_steps)
        if share < 1 and run.step % self.window:
            return
        for key, _, _, _ in self._training(run):
            if (total := run.memory.pop(f"window/{key}", None)) is not None:
                sensitivity.note(run, key, total / self.window, self.mean_decay, self.spread_decay)
        if share > 0:
            self._freeze(run, share)

    def _freeze(self, run: Run, share: float) -> None:
        found = [sensitivity.score(run, key) for key, _, _, _ in self._tensors(run)]
        known = [score.flatten() for score in found if score is not None]
        threshold = _quantile(torch.cat([score.cpu() for score in known]), share) if known else 0.0
        for key, slot, name, _ in list(self._training(run)):
            score = sensitivity.score(run, key)
            if share == 1 or (score is not None and float(score.mean()) < threshold):
                run.memory["frozen"] = [*run.memory["frozen"], key]
                set_trainable(run.graft, [slot], False, run.optimizer, only=[name])
        if share == 1:
            sensitivity.forget(run)

    def _training(self, run: Run) -> Iterator[tuple[str, Slot, str, nn.Parameter]]:
        return (found for found in self._tensors(run) if found[0] not in run.memory["frozen"])

    def _tensors(self, run: Run) -> Iterator[tuple[str, Slot, str, nn.Parameter]]:
        for slot in run.graft.all_slots:
            for name, parameter in slot.named_parameters():
                if name in self.tensors and name not in slot.borrowed and slot.delta.scalable:
                    yield f"{slot.key}/{name}", slot, name, parameter


def _quantile(values: Tensor, share: float) -> float:
    """The number below which lies a share of some numbers."""
    return float(values.kthvalue(min(len(values), max(1, round(share * len(values))))).values)
