"""A low-rank gain on the entries of a weight (HiRA, Huang et al. 2025; HUT, Zhang et al. 2025)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import MATRICES
from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.deltas.rebuilding import rebuilding_weight
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("low-rank-gain")
class LowRankGain(Delta):
    """``W * (1 + s B A)``, entry by entry: a change of up to ``rank`` times the rank of ``W``. Zeros stay zero.

    Attributes:
        rank: inner width.
        scale: the factor ``s``.
    """

    kind = "low-rank-gain"
    on = MATRICES
    reads_weight: ClassVar[bool] = True

    rank: PositiveInt = 8
    scale: PositiveFloat = 1.0

    def shapes(self, site: Site) -> Shapes:
        return {"a": (*site.batch, self.rank, site.fan_in), "b": (*site.batch, site.fan_out, self.rank)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"a": kaiming_uniform(self.shapes(site)["a"], rng)}

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        return {"a": (-2,), "b": (-1,)}

    def weight(self, p: Any, w: Tensor) -> Tensor:
        return w * (1 + self.scale * (p.b @ p.a)).to(w.dtype)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        return rebuilding_weight(self, p, layer, x)
