"""Pruning what trains before it trains (SparseAdapter, He et al. 2022, arXiv:2210.04284)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn

from finegraft.control import batches
from finegraft.control.controller import Controller
from finegraft.control.pruning_scores import OWN, Scored, data_needed, scored
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.registry import controllers, nearest, scores

_KEY = "kept/"


@controllers.register("prune-at-start")
class PruneAtStart(Controller):
    """At the first step entries of the graft's matrices become zero, and stay so.

    It acts on all trained tensors with two axes or more, but for new heads and changes of chosen units. Scores of data
    are taken on the batches of the first step. A matrix that starts at zero has no scores: take an init that has none.

    Attributes:
        score: any score that the weights and the gradients of a loss give (``random``, ``magnitude``, ``sensitivity``
            which is SNIP, ``fisher`` ...), or ``grasp``, ``synflow``, ``erdos-renyi``.
        density: share of entries that stay.
        scope: entries compete over all matrices (``model``) or within each (``tensor``).
        rounds: in how many steps the density is reached; each scores what the one before has left.
        schedule: ``exponential``, density ``d^(t / rounds)`` after round ``t``, or ``linear``.
    """

    kind = "prune-at-start"

    score: str = "sensitivity"
    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    scope: Literal["model", "tensor"] = "model"
    rounds: PositiveInt = 1
    schedule: Literal["exponential", "linear"] = "exponential"

    @field_validator("score")
    @classmethod
    def _score_exists(cls, score: str) -> str:
        if score not in OWN and (score not in scores or scores[score].needs == "inputs"):
            known = [*OWN, *(name for name, found in scores.items() if found.needs != "inputs")]
            raise ValueError(f"no score to prune by is named {score!r}; {nearest(score, known)}")
        return score

    def start(self, run: Run) -> None:
        if not matrices(run):
            raise RecipeError(
                f"control {self.kind!r} prunes matrices; recipe {run.graft.recipe.name!r} trains none beside heads"
            )
        if data_needed(self.score) and run.loss is None:
            raise RecipeError(f"score {self.score!r} looks at a loss: give loss=, the loss of a batch, to fg.Control")

    def after_backward(self, run: Run, batch: Any) -> None:
        if not self._pruned(run) and data_needed(self.score):
            batches.keep(run, batch, len(batches.kept_batches(run)) + 1)

    def before_update(self, run: Run) -> None:
        if not self._pruned(run):
            self._prune(run)
        for name, parameter in matrices(run).items():
            if parameter.grad is not None:
                parameter.grad.mul_(run.memory[_KEY + name])

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for name, parameter in matrices(run).items():
            parameter.mul_(run.memory[_KEY + name])

    def densities(self) -> list[float]:
        """The density after each round."""
        steps = [(number + 1) / self.rounds for number in range(self.rounds)]
        if self.schedule == "exponential":
            return [self.density**step for step in steps]
        return [1 - (1 - self.density) * step for step in steps]

    def _pruned(self, run: Run) -> bool:
        return any(name.startswith(_KEY) for name in run.memory)

    def _prune(self, run: Run) -> None:
        found = matrices(run)
        kept = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in found.items()}
        for density in self.densities():
            own = Scored(run, found, batches.kept_batches(run))
            kept = chosen(scored(self.score, own), kept, density, self.scope)
            with torch.no_grad():
                for name, parameter in found.items():
                    parameter.mul_(kept[name])
        batches.forget(run)
        run.memory |= {_KEY + name: mask for name, mask in kept.items()}


def matrices(run: Run) -> dict[str, nn.Parameter]:
    """Trained tensors with two axes or more, by name."""
    deltas = run.graft.deltas
    plain = {key for key, slot in deltas.items() if slot.delta.scalable and not slot.delta.needs_selection}
    named = run.graft.named_parameters()
    return {name: p for name, p in named if p.ndim > 1 and name.rpartition("/")[0] in plain}


def chosen(found: dict[str, Tensor], kept: dict[str, Tensor], density: float, scope: str) -> dict[str, Tensor]:
    """The entries of highest scores among those kept so far, ``density`` of all, rounded down but one at least.

    Raises:
        RecipeError: all scores are the same, so that they say nothing.
    """
    if scope == "tensor":
        return {name: chosen({name: found[name]}, {name: kept[name]}, density, "model")[name] for name in found}
    flat = torch.cat([found[name].flatten() for name in found])
    if bool((flat == flat[0]).all()):
        raise RecipeError(
            "scores at the start are all the same, so nothing tells what to prune: matrices that start at zero give no "
            "scores. Take init: bert or houlsby, which start none at zero, or score: random"
        )
    free = torch.cat([kept[name].flatten() for name in found])
    flat = flat.masked_fill(~free, float("-inf"))
    mask = torch.zeros_like(free)
    mask[flat.topk(max(1, int(density * len(flat)))).indices] = True
    parts = mask.split([found[name].numel() for name in found])
    return {name: part.view(found[name].shape) for name, part in zip(found, parts, strict=True)}
