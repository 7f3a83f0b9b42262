"""A low-rank change with a trained matrix between its factors (AdaLoRA, IncreLoRA, TriAdaptLoRA)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Shapes
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("three-factor")
class ThreeFactor(Factored):
    """``W + s B M A`` with ``A: (rank, in)``, ``B: (out, rank)`` and ``M`` a diagonal or a matrix; all three train.

    A diagonal starts at zero between random factors, as in AdaLoRA (Zhang et al. 2023, arXiv:2303.10512). A matrix
    starts as the identity, and ``B`` at zero: either way a fresh change is the identity, and each rank can learn.

    Attributes:
        rank: inner width.
        alpha: ``s`` is ``alpha / rank``.
        middle: what ``M`` is.
        std: deviation of random factors at the start.
    """

    kind = "three-factor"

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    middle: Literal["diagonal", "full"] = "diagonal"
    std: PositiveFloat = 0.02

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        return {"a": (-2,), "b": (-1,), "m": (-1,) if self.middle == "diagonal" else (-2, -1)}

    def frames(self, p: Any) -> list[Tensor]:
        return [p.a, p.b.transpose(-1, -2)]

    def shapes(self, site: Site) -> Shapes:
        middle = (self.rank,) if self.middle == "diagonal" else (self.rank, self.rank)
        return {
            "a": (*site.batch, self.rank, site.fan_in),
            "b": (*site.batch, site.fan_out, self.rank),
            "m": (*site.batch, *middle),
        }

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        a = self.std * torch.randn(shapes["a"], generator=rng)
        if self.middle == "full":
            return {"a": a, "m": torch.eye(self.rank).expand(shapes["m"]).clone()}
        return {"a": a, "b": self.std * torch.randn(shapes["b"], generator=rng)}

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        b = p.b * p.m.unsqueeze(-2) if self.middle == "diagonal" else p.b @ p.m
        return p.a, self.alpha / max(1, self.rank) * b
