"""Contrastive penalties that draw samples to their task's embedding (PHA, Zhao et al. 2023, arXiv:2310.11670)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import PositiveFloat
from torch import Tensor

from finegraft.control.controller import Controller
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.grafting.tasks import retrieving
from finegraft.registry import controllers


@controllers.register("prototypes")
class Prototypes(Controller):
    """``strength`` times two contrastive losses of retrieved vectors: with each other, and with tasks' embeddings.

    They train the retriever and the embeddings, not the base's features. Each needs samples or embeddings of at least
    two tasks, or it is left out; they act with and without label smoothing.

    Attributes:
        strength: coefficient of both.
        temperature: what cosines are divided by.
    """

    kind = "prototypes"

    strength: PositiveFloat = 0.1
    temperature: PositiveFloat = 0.1

    def start(self, run: Run) -> None:
        if not any(slot.delta.auxiliary for slot in run.graft.all_slots):
            raise RecipeError(
                f"control {self.kind!r} trains a retriever, and recipe {run.graft.recipe.name!r} has none: set "
                "retriever: true in a part of kind 'hyper'"
            )

    def penalty(self, run: Run) -> Tensor | None:
        slot = retrieving(run.graft)
        if slot is None:
            return None
        near = slot.delta.retrieved(slot)
        tasks = _tasks(slot.task, near)
        terms = []
        if len(tasks.unique()) > 1:
            terms.append(among_samples(near, tasks, self.temperature))
        prototypes = slot.delta.prototypes(slot)
        if len(prototypes) > 1:
            terms.append(F.cross_entropy(near @ prototypes.T / self.temperature, tasks))
        return self.strength * torch.stack(terms).sum() if terms else None


def _tasks(task: tuple | None, near: Tensor) -> Int[Tensor, " samples"]:
    if task and isinstance(task[0], tuple):
        return torch.tensor([own[0] for own in task], device=near.device)
    return torch.full((len(near),), task[0] if task else 0, device=near.device)


def among_samples(
    near: Float[Tensor, "samples embedding"], tasks: Int[Tensor, " samples"], temperature: float
) -> Float[Tensor, ""]:
    """Mean negative log share of a sample's own task among the other samples (supervised contrastive loss)."""
    itself = torch.eye(len(near), dtype=torch.bool, device=near.device)
    shares = (near @ near.T / temperature).masked_fill(itself, -torch.inf).log_softmax(-1)
    alike = (tasks.unsqueeze(0) == tasks.unsqueeze(1)) & ~itself
    own = shares.masked_fill(~alike, 0).sum(-1)[alike.any(-1)] / alike.sum(-1)[alike.any(-1)]
    return -own.mean() if len(own) else near.sum() * 0
