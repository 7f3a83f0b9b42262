"""A penalty that keeps maps near the identity."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch import Tensor

from finegraft.control.controller import Controller
from finegraft.control.penalties import sum_of
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.registry import controllers


@controllers.register("identity-penalty")
class IdentityPenalty(Controller):
    """``strength * sum ||I - V||^2`` over the square matrices of a name (AdapterFusion's values).

    Attributes:
        strength: its coefficient.
        tensors: their name.
    """

    kind = "identity-penalty"

    strength: PositiveFloat = 0.01
    tensors: str = "to_value"

    def start(self, run: Run) -> None:
        if not self._found(run):
            raise RecipeError(f"control {self.kind!r}: no square matrix that trains is named {self.tensors!r}")

    def penalty(self, run: Run) -> Tensor | None:
        gaps = [(torch.eye(len(v), dtype=v.dtype, device=v.device) - v).square().sum() for v in self._found(run)]
        return self.strength * sum_of(gaps) if gaps else None

    def _found(self, run: Run) -> list[Tensor]:
        named = ((key.rpartition("/")[2], tensor) for key, tensor in run.graft.named_parameters())
        return [t for name, t in named if name == self.tensors and t.ndim == 2 and t.shape[0] == t.shape[1]]
