"""Learned binary masks over a frozen weight (mask tuning as in R-AMT, Zheng et al. 2023, arXiv:2307.15049)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from finegraft.deltas.delta import Delta, Shapes
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("mask")
class Mask(Delta):
    """``W * [score > 0]`` with scores that all start at ``margin``, so every unit starts kept.

    The gradient passes the threshold unchanged (straight-through).

    Attributes:
        unit: what one score keeps or drops: an entry, a row or a column.
        margin: score at the start, the distance of each unit from being dropped.
    """

    kind = "mask"

    unit: Literal["entry", "row", "column"] = "entry"
    margin: PositiveFloat = 5e-3

    def shapes(self, site: Site) -> Shapes:
        rows = 1 if self.unit == "column" else site.fan_out
        columns = 1 if self.unit == "row" else site.fan_in
        return {"scores": (*site.batch, rows, columns)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"scores": torch.full(self.shapes(site)["scores"], self.margin)}

    def weight(self, p: Any, w: Tensor) -> Tensor:
        kept = (p.scores > 0).to(w.dtype)
        return w * (kept + (p.scores - p.scores.detach()).to(w.dtype))
