"""Ending a training at an average of its steps."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from finegraft.control.controller import Controller
from finegraft.control.run import Run
from finegraft.registry import controllers


@controllers.register("weight-average")
class WeightAverage(Controller):
    """Trained tensors end as ``m * average + (1 - m) * values`` of all steps (R-Adapter's accumulation).

    The momentum grows to ``m`` over the first steps, ``(1 + t) / (10 + t)``, so that short trainings do not end near
    their start. New heads stay as trained.

    Attributes:
        momentum: ``m``.
    """

    kind = "weight-average"

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.999

    def start(self, run: Run) -> None:
        run.memory |= {f"average/{name}": p.detach().clone() for name, p in self._own(run).items()}

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        momentum = min(self.momentum, (1 + run.step) / (10 + run.step))
        for name, parameter in self._own(run).items():
            run.memory[f"average/{name}"].lerp_(parameter, 1 - momentum)

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        for name, parameter in self._own(run).items():
            parameter.copy_(run.memory[f"average/{name}"])

    @staticmethod
    def _own(run: Run) -> dict[str, torch.nn.Parameter]:
        heads = {key for key, slot in run.graft.deltas.items() if not slot.delta.scalable}
        named = run.graft.named_parameters()
        return {name: parameter for name, parameter in named if name.rpartition("/")[0] not in heads}
