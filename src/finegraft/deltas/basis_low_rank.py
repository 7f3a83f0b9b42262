"""Low-rank changes whose inputs are orthogonal (Orthogonal Adaptation, Po et al. 2024, arXiv:2312.02432)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Shapes
from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("basis-low-rank")
class BasisLowRank(Factored):
    """``W + s B A``: ``B`` trains from zero, ``A`` is ``rank`` rows of a random orthogonal matrix that a seed gives.

    Changes of one seed and of different concepts read orthogonal inputs, so that a sum of them lets none disturb
    another. ``A`` is in no file. The matrix is the cosine transform with rows in random order and columns of random
    sign; ``rank out`` numbers train.

    Attributes:
        rank: inner width.
        concept: which rows are taken: those from ``concept * rank`` on.
        scale: the factor ``s``.
        seed: of the orthogonal matrix.
    """

    kind = "basis-low-rank"

    rank: PositiveInt = 8
    concept: NonNegativeInt = 0
    scale: PositiveFloat = 1.0
    seed: NonNegativeInt = 0

    def fits(self, site: Site) -> None:
        super().fits(site)
        if (self.concept + 1) * self.rank > site.fan_in:
            raise SiteError(
                f"{site.name!r} takes {site.fan_in} inputs, which hold {site.fan_in // self.rank} concepts of rank "
                f"{self.rank}: number {self.concept} is not among them. Use a smaller rank, or leave this site out"
            )

    def shapes(self, site: Site) -> Shapes:
        return {"b": (*site.batch, site.fan_out, self.rank)}

    def working(self, site: Site) -> dict[str, Tensor]:
        first = self.concept * self.rank
        return {"a": orthogonal_rows(site.fan_in, range(first, first + self.rank), self.seed)}

    def working_key(self, site: Site) -> Hashable:
        return site.fan_in

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        return p.a, self.scale * p.b


def orthogonal_rows(width: int, rows: range, seed: int) -> Float[Tensor, "rows width"]:
    """Some rows of a random orthogonal matrix, in double precision."""
    rng = torch.Generator().manual_seed(seed)
    frequency = torch.randperm(width, generator=rng)[rows.start : rows.stop].double().unsqueeze(-1)
    signs = torch.randint(2, (width,), generator=rng).double() * 2 - 1
    waves = torch.cos(math.pi / width * frequency * (torch.arange(width) + 0.5).double())
    return signs * waves * (torch.where(frequency == 0, 1.0, 2.0).double() / width).sqrt()
