"""Low-rank factors that layers have in common, with a small core of each layer's own (LoTR, arXiv:2402.01376)."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Shapes
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("shared-low-rank")
class SharedLowRank(Factored):
    """``W + (alpha / rank) B G A``: sites of one role and shape have ``A`` and ``B`` in common, ``G`` is each site's.

    Stacked, the changes of these sites are one tensor of Tucker ranks ``(., rank, rank)``; they train
    ``rank (in + out) + sites rank^2`` numbers. ``G`` starts at zero.

    Attributes:
        rank: inner width.
        alpha: numerator of the scaling.
    """

    kind = "shared-low-rank"

    rank: PositiveInt = 16
    alpha: PositiveFloat = 16.0

    def sharing(self, site: Site) -> dict[str, str]:
        return dict.fromkeys(("a", "b"), same_role(site))

    def shapes(self, site: Site) -> Shapes:
        return {
            "a": (*site.batch, self.rank, site.fan_in),
            "b": (*site.batch, site.fan_out, self.rank),
            "core": (*site.batch, self.rank, self.rank),
        }

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        return {name: torch.randn(shapes[name], generator=rng) / math.sqrt(shapes[name][-1]) for name in ("a", "b")}

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        core = p.core * (self.alpha / self.rank)
        return core @ p.a.to(core.device), p.b.to(core.device)


def same_role(site: Site) -> str:
    """A label that sites of one role and shape have in common."""
    return f"{site.stack} {site.role} {'x'.join(map(str, site.matrix_shape))}"
