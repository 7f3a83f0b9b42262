"""Learning rates that fall with the norm of what they move."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor, nn

from finegraft.control.controller import Controller
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.registry import controllers


@controllers.register("row-rates")
class RowRates(Controller):
    """Multiplies the learning rate of each row ``w`` of trained matrices by ``1 / sqrt(|w| + 1 / largest^2)`` (ALLoRA,
    Huang and Balestriero 2024, arXiv:2410.09692).

    The factor is ``largest`` at a row of zeros, such as those of ``B`` at the start, and falls as the row grows.

    Attributes:
        largest: the factor at zero, the paper's ``eta``.
        of: what is multiplied: the optimizer's ``update``, or the ``gradient`` before it, which optimizers like AdamW
            undo, for they divide by its size.
        tensors: only matrices of this name, such as ``b``; None takes all beside those of heads.
    """

    kind = "row-rates"

    largest: PositiveFloat = 2.0
    of: Literal["update", "gradient"] = "update"
    tensors: str | None = None

    def start(self, run: Run) -> None:
        if not self._matrices(run):
            named = "" if self.tensors is None else f" named {self.tensors!r}"
            raise RecipeError(f"control {self.kind!r}: there is no matrix{named} that trains beside heads")

    @torch.no_grad()
    def before_update(self, run: Run) -> None:
        for name, matrix in self._matrices(run).items():
            if matrix.grad is None:
                continue
            if self.of == "gradient":
                matrix.grad.mul_(row_factors(matrix, self.largest))
            else:
                run.memory[name] = matrix.detach().clone()

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for name, matrix in self._matrices(run).items():
            before = run.memory.pop(name, None)
            if before is not None:
                matrix.copy_(torch.lerp(before, matrix, row_factors(before, self.largest).expand_as(before)))

    def _matrices(self, run: Run) -> dict[str, nn.Parameter]:
        heads = {id(p) for slot in run.graft.all_slots if not slot.delta.scalable for p in slot.parameters()}
        named = {name: p for name, p in run.graft.named_parameters() if p.ndim > 1 and id(p) not in heads}
        return {name: p for name, p in named.items() if self.tensors in (None, name.rpartition("/")[2])}


def row_factors(matrix: Float[Tensor, "*batch rows columns"], largest: float) -> Float[Tensor, "*batch rows 1"]:
    """``1 / sqrt(|w| + 1 / largest^2)`` of each row ``w``."""
    return (torch.linalg.vector_norm(matrix, dim=-1, keepdim=True) + 1 / largest**2).rsqrt()
