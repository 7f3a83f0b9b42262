"""A penalty that sets how many tokens go through the base."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from finegraft.control.controller import Controller
from finegraft.control.run import Run
from finegraft.deltas.token_router import Noted
from finegraft.errors import RecipeError
from finegraft.registry import controllers


@controllers.register("token-rate")
class TokenRate(Controller):
    """``strength * (mean of all gates - target)^2`` over the layers and tokens of a batch (Dynamic Tuning).

    For the gates of kind ``token-router`` with ``choice: threshold``.

    Attributes:
        strength: its coefficient.
        target: share of tokens that go through.
    """

    kind = "token-rate"

    strength: PositiveFloat = 2.0
    target: Annotated[float, Field(ge=0, le=1)] = 0.5

    def start(self, run: Run) -> None:
        if not _routers(run):
            raise RecipeError(
                f"control {self.kind!r} acts on kind 'token-router' with choice: threshold; "
                f"recipe {run.graft.recipe.name!r} has none"
            )

    def before_step(self, run: Run) -> None:
        for slot in _routers(run):
            slot.noted = Noted()

    def penalty(self, run: Run) -> Tensor | None:
        gates = [taken for slot in _routers(run) if (taken := slot.noted.take()) is not None]
        if not gates:
            return None
        mean = torch.cat([taken.flatten().to(gates[0].device) for taken in gates]).mean()
        return self.strength * (mean - self.target) ** 2


def _routers(run: Run) -> list[Any]:
    return [s for s in run.graft.all_slots if s.delta.kind == "token-router" and s.delta.choice == "threshold"]
