"""Blocks train in turn, more often the more their changes were seen to matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.control.blocks import by_block, draw, in_blocks, slots_of, train_only
from finegraft.control.controller import Controller
from finegraft.control.processes import mean_over_processes
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.registry import controllers

_TRIES = 100
"""Draws of a candidate set before fewer of them will do; scores so far apart leave little to find out."""


@controllers.register("importance-sampling")
class ImportanceSampling(Controller):
    """In each step a few blocks train, drawn by importances learned on the way (IST, Yao et al. 2024, EMNLP Findings).

    Each block has a score ``s``, zero at first, that grows with its *un*importance. The blocks of a step are drawn with
    weights ``sigmoid(-s)``. Every few steps, sets of blocks drawn with weights ``sigmoid(s)`` are tried out: their
    changes act at a fraction while the loss of a batch is computed, and with ``r = exp(-loss)``, centred over the
    sets, each block of a set gets ``s += rate * r * p (1 - p)``, ``p = sigmoid(s)``.

    The batch is the first of the step, as the model stands before its update; the authors take another one of 16 rows.
    The new scores count from the next step on. What lies outside of blocks always trains.

    Attributes:
        share: of the blocks that train in a step, rounded down but at least one.
        every: steps between two trials.
        candidates: sets of blocks in a trial, all distinct.
        suppressed: share of the blocks in a set, rounded down but at least one.
        factor: at which the changes of a set act in its trial.
        rate: of learning the scores.
    """

    kind = "importance-sampling"
    freezes_sites = True

    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    every: PositiveInt = 10
    candidates: PositiveInt = 3
    suppressed: Annotated[float, Field(gt=0, le=1)] = 0.5
    factor: Annotated[float, Field(ge=0, lt=1)] = 0.25
    rate: PositiveFloat = 10.0

    def before_step(self, run: Run) -> None:
        if run.loss is None:
            raise RecipeError(f"control {self.kind!r} tries blocks out, and needs loss=, a function of a batch")
        blocks = list(by_block(run.graft).values())
        scores = run.memory.setdefault("unimportance", torch.zeros(len(blocks))).cpu()
        active = draw((-scores).sigmoid(), _part(self.share, len(blocks)), run.rng(self.kind, "active"))
        train_only(run, [slot for i in active.tolist() for slot in slots_of(blocks[i])], slots_of(in_blocks(run.graft)))

    def after_backward(self, run: Run, batch: Any) -> None:
        if run.step == 0 or run.step % self.every or run.memory.get("tried") == run.step:
            return
        run.memory["tried"] = run.step
        scores = run.memory["unimportance"].cpu()
        sets = self._candidates(scores.sigmoid(), run.rng(self.kind, "candidates"))
        run.memory["unimportance"] = learned(scores, sets, _losses(run, sets, batch, self.factor), self.rate)

    def finish(self, run: Run) -> None:
        everything = slots_of(in_blocks(run.graft))
        train_only(run, everything, everything)

    def _candidates(self, weights: Float[Tensor, " blocks"], rng: torch.Generator) -> list[Int[Tensor, " suppressed"]]:
        size = _part(self.suppressed, len(weights))
        wanted = min(self.candidates, math.comb(len(weights), size))
        found: dict[tuple[int, ...], Tensor] = {}
        for _ in range(_TRIES):
            if len(found) == wanted:
                break
            drawn = draw(weights, size, rng)
            found.setdefault(tuple(drawn.tolist()), drawn)
        return list(found.values())


def learned(
    scores: Float[Tensor, " blocks"], sets: Sequence[Int[Tensor, " suppressed"]], losses: Sequence[float], rate: float
) -> Float[Tensor, " blocks"]:
    """The scores after a trial: blocks whose suppression did least harm become less important."""
    rewards = torch.tensor([math.exp(-loss) for loss in losses], dtype=torch.float64)
    slope = (scores.sigmoid() * (1 - scores.sigmoid())).double()
    change = torch.zeros_like(slope)
    for chosen, reward in zip(sets, (rewards - rewards.mean()).tolist(), strict=True):
        change[chosen] += reward * slope[chosen]
    return (scores + rate * change).to(scores.dtype)


def _part(share: float, blocks: int) -> int:
    return max(1, int(share * blocks))


@torch.no_grad()
def _losses(run: Run, sets: Sequence[Tensor], batch: Any, factor: float) -> list[float]:
    """The loss of a batch, in evaluation mode, under the suppression of each set; equal in all processes."""
    assert run.loss is not None
    model, blocks = run.graft.model, list(by_block(run.graft).values())
    modes = {module: module.training for module in model.modules()}
    losses = []
    try:
        model.eval()
        for chosen in sets:
            names = [placement.site.name for i in chosen.tolist() for placement in blocks[i]]
            with run.graft.scaled_at(names, factor):
                losses.append(run.loss(batch).detach().float())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return mean_over_processes(torch.stack(losses)).tolist()
