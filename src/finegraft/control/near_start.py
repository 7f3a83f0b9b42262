"""Keeping the rows of a trained table near where they started."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from finegraft.control.controller import Controller
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.registry import controllers

_PRETRAINED_WIDTH = 2048
_LABEL, _INPUT = 0, 2


@controllers.register("near-start")
class NearStart(Controller):
    """After each step, row ``t`` of a tensor is pulled back into the ball of radius ``epsilon_t`` about its start.

    As in context-aware prompt tuning (Blau et al. 2025, arXiv:2410.17222): ``epsilon = radius * sqrt(width / 2048)``,
    rows of label tokens stay, and a table that begins as the vectors of examples so remains these examples, nearly.

    Attributes:
        tensor: name of the trained tensors.
        types: for each row what its token is, modulo 4: 1 template of an input, 2 input, 3 template of an output, 0
            label; empty takes all for input.
        radius: of input tokens.
        template_radius: of template tokens.
    """

    kind = "near-start"

    tensor: str = "prompt"
    types: tuple[Annotated[int, Field(ge=0)], ...] = ()
    radius: NonNegativeFloat = 0.1
    template_radius: NonNegativeFloat = 0.1

    def start(self, run: Run) -> None:
        tables = self._tables(run)
        if not tables:
            raise RecipeError(
                f"control {self.kind!r} finds no trained tensor {self.tensor!r}: name one of the recipe's"
            )
        for name, table in tables.items():
            if self.types and len(self.types) != len(table):
                raise RecipeError(
                    f"control {self.kind!r} has {len(self.types)} types for the {len(table)} rows of {name!r}"
                )
        run.memory.update({name: table.detach().clone() for name, table in tables.items()})

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for name, table in self._tables(run).items():
            start = run.memory[name].to(table.device, table.dtype)
            table.copy_(start + self.within(table - start))

    def within(self, change: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """A change of a table, its rows cut to their radii."""
        radii = self.radii(len(change), change.shape[-1]).to(change)
        norms = torch.linalg.vector_norm(change, dim=-1)
        share = torch.where(
            norms > radii, radii / norms.clamp(min=torch.finfo(change.dtype).tiny), torch.ones_like(norms)
        )
        return change * share.unsqueeze(-1)

    def radii(self, rows: int, width: int) -> Tensor:
        """The radius of each row."""
        by_type = {_LABEL: 0.0, _INPUT: self.radius}
        types = self.types or (_INPUT,) * rows
        return (
            torch.tensor([by_type.get(t % 4, self.template_radius) for t in types]) * (width / _PRETRAINED_WIDTH) ** 0.5
        )

    def _tables(self, run: Run) -> dict[str, Any]:
        named = run.graft.named_parameters()
        return {name: tensor for name, tensor in named if name.rpartition("/")[2] == self.tensor}
