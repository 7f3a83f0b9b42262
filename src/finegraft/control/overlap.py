"""A penalty on changes that overlap with the weight, or with each other."""

from __future__ import annotations

from itertools import combinations

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from finegraft.control.controller import Controller
from finegraft.control.penalties import sum_of
from finegraft.control.run import Run
from finegraft.deltas.low_rank import LowRank
from finegraft.errors import RecipeError
from finegraft.grafting.stack import Placement
from finegraft.registry import controllers


@controllers.register("overlap")
class Overlap(Controller):
    """``strength * (sum_i |W D_i^T| + sum_i<j |D_i D_j^T|)`` over the low-rank changes ``D_i`` of each site, with the
    sum of absolute entries as norm (PEGO, Hu et al. 2024, arXiv:2407.15085).

    It falls to zero where what the changes read is orthogonal to what the weight reads, and to each other.

    Attributes:
        strength: its coefficient.
    """

    kind = "overlap"

    strength: PositiveFloat = 1e-3

    def start(self, run: Run) -> None:
        if not any(_changes(placement) for placement in run.graft.placements):
            raise RecipeError(
                f"control {self.kind!r} acts on kind 'low-rank'; recipe {run.graft.recipe.name!r} has none"
            )

    def penalty(self, run: Run) -> Tensor | None:
        terms = []
        for placement in run.graft.placements:
            if changes := _changes(placement):
                terms.append(overlap(placement.site.weight, changes))
        return self.strength * sum_of(terms) if terms else None


def overlap(
    weight: Float[Tensor, "*batch out in"], changes: list[tuple[Float[Tensor, ...], Float[Tensor, ...]]]
) -> Float[Tensor, ""]:
    """How far changes ``B A``, given as ``(A, B)``, overlap with a weight and with each other."""
    total = weight.new_zeros((), dtype=changes[0][0].dtype)
    for a, b in changes:
        total = total + _entries((weight.to(a.dtype) @ a.mT) @ b.mT)
    for (a, b), (c, d) in combinations(changes, 2):
        total = total + _entries(b @ (a @ c.mT) @ d.mT)
    return total


def _entries(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, ord=1)


def _changes(placement: Placement) -> list[tuple[Tensor, Tensor]]:
    slots = [slot for slot in placement.slots if isinstance(slot.delta, LowRank)]
    return [(slot.delta.scale * a, b) for slot in slots for a, b in [slot.delta.joined(slot)]]
