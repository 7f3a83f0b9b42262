"""A low-rank change for each of a few blocks on the diagonal (MELoRA, Ren et al. 2024, arXiv:2402.17263)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Shapes
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("block-low-rank")
class BlockLowRank(Factored):
    """``W + (alpha / rank) blockdiag(B_1 A_1, ..., B_n A_n)``: of rank ``n rank`` with the numbers of ``rank`` alone.

    Attributes:
        blocks: ``n``; where it is no common divisor of out and in, the largest one below.
        rank: inner width of each block.
        alpha: numerator of the scaling.
    """

    kind = "block-low-rank"

    blocks: PositiveInt = 4
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0

    def shapes(self, site: Site) -> Shapes:
        n = max(d for d in range(1, self.blocks + 1) if site.fan_in % d == site.fan_out % d == 0)
        a, b = (self.rank, site.fan_in // n), (site.fan_out // n, self.rank)
        return {"a": (*site.batch, n, *a), "b": (*site.batch, n, *b)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"a": kaiming_uniform(self.shapes(site)["a"], rng)}

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        return {"a": (-2,), "b": (-1,)}

    def inner_width(self, p: Any) -> int:
        return int(p.a.shape[-3]) * self.rank

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        return _block_diagonal(p.a), _block_diagonal(self.alpha / max(1, self.rank) * p.b)


def _block_diagonal(blocks: Float[Tensor, "*batch n rows columns"]) -> Float[Tensor, "*batch height width"]:
    diagonal = torch.eye(blocks.shape[-3], dtype=blocks.dtype, device=blocks.device)
    return (blocks.unsqueeze(-2) * diagonal[:, None, :, None]).flatten(-2).flatten(-3, -2)
