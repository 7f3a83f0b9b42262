"""A low-rank map of a layer's output (the sequential branch of Hydra, Kim et al. 2023, arXiv:2309.06922)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.low_rank_linear import add_low_rank
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("output-low-rank")
class OutputLowRank(Delta):
    """``(I + s B A) (W x + b)`` with ``A: (rank, out)`` and ``B: (out, rank)``.

    Attributes:
        rank: inner width.
        scale: the factor ``s``.
        skip: share of passes in training that leave the change out at a site; others scale it by ``1 / (1 - skip)``.
    """

    kind = "output-low-rank"
    on = ("linear", "embedding", "tensor")

    rank: PositiveInt = 8
    scale: PositiveFloat = 1.0
    skip: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def shapes(self, site: Site) -> Shapes:
        return {"a": (*site.batch, self.rank, site.channels), "b": (*site.batch, site.channels, self.rank)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"a": kaiming_uniform(self.shapes(site)["a"], rng)}

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        return {"a": (-2,), "b": (-1,)}

    def weight(self, p: Any, w: Tensor) -> Tensor:
        a, b = self.scale * p.a.to(w.dtype), p.b.to(w.dtype)
        if p.op.out_axis == -1:
            return w + (w @ a.transpose(-1, -2)) @ b.transpose(-1, -2)
        return w + b @ (a @ w)

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        return b if b is None else b + self.scale * (p.b @ (p.a @ b.to(p.a.dtype))).to(b.dtype)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        y = layer(x)
        b = p.b
        if self.skip and p.training:
            b = b * (torch.full((1,), 1 - self.skip, device=b.device, dtype=b.dtype).bernoulli() / (1 - self.skip))
        return add_low_rank(y, y, p.a, b, scale=self.scale)
