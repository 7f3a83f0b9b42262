"""A penalty that keeps factors orthonormal."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from finegraft.control.controller import Controller
from finegraft.control.penalties import sum_of
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.registry import controllers


@controllers.register("orthonormality")
class Orthonormality(Controller):
    """``strength * |F F^T - I|`` (Frobenius, not squared) for the matrices ``F`` that changes want orthonormal.

    These are both factors of low-rank changes, in AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) and, with the weight's
    part that they stand for, in SORSA (Cao and Song 2024, arXiv:2409.00055); and the unit vectors of reflections in HRA
    (Yuan et al. 2024, arXiv:2405.17484).

    Attributes:
        strength: its coefficient.
        over: the ``mean`` over all matrices, or their ``sum``.
        per_rate: divide by the recipe's learning rate, as in SORSA: under SGD a step then follows the penalty by
            ``strength``, whatever the rate.
    """

    kind = "orthonormality"

    strength: PositiveFloat = 0.1
    over: Literal["mean", "sum"] = "mean"
    per_rate: bool = False

    def start(self, run: Run) -> None:
        if not _frames(run):
            raise RecipeError(
                f"control {self.kind!r} acts on factors and reflections; recipe {run.graft.recipe.name!r} has kinds "
                f"{', '.join(sorted({slot.delta.kind for slot in run.graft.all_slots}))}, which want none orthonormal"
            )

    def penalty(self, run: Run) -> Tensor | None:
        gaps = [gap_to_orthonormal(frame) for frame in _frames(run) if frame.requires_grad and frame.numel()]
        if not gaps:
            return None
        strength = self.strength / (run.graft.recipe.train.lr if self.per_rate else 1)
        return strength / (len(gaps) if self.over == "mean" else 1) * sum_of(gaps)


def gap_to_orthonormal(frame: Float[Tensor, "*batch rank n"]) -> Float[Tensor, ""]:
    """``|F F^T - I|``, the mean over a batch of matrices."""
    gap = frame @ frame.transpose(-1, -2) - torch.eye(frame.shape[-2], dtype=frame.dtype, device=frame.device)
    return torch.linalg.matrix_norm(gap).mean()


def _frames(run: Run) -> list[Tensor]:
    return [frame for slot in run.graft.all_slots for frame in slot.delta.frames(slot)]
