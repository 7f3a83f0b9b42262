"""A full-rank sum of random products with trained diagonals (RandLoRA, Albert et al. 2025, arXiv:2502.00987)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Shapes
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("random-sum")
class RandomSum(Factored):
    """``W + (alpha / r) sum_j B_j diag(l_j) A diag(g_j)`` with random ``A: (r, in)`` and ``B_j: (out, r)``.

    There are as many terms as full rank takes. ``A`` lies on the narrower side, so that the sum is transposed where
    ``out < in``. The random factors follow from the seed, are the same at all sites of equal sizes, and are in no file.

    Attributes:
        rank: ``r`` of each term.
        alpha: numerator of the scaling.
        seed: of the random factors.
    """

    kind = "random-sum"

    rank: PositiveInt = 32
    alpha: PositiveFloat = 640.0
    seed: NonNegativeInt = 0

    def shapes(self, site: Site) -> Shapes:
        narrow = min(site.fan_in, site.fan_out)
        terms = -(-narrow // self.rank)
        return {"values": (*site.batch, self.rank, terms), "gains": (*site.batch, terms, narrow)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shape = self.shapes(site)["gains"]
        return {"gains": torch.full(shape, 1 / max(shape[-2:]))}

    def working(self, site: Site) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(self.seed)
        (terms, narrow), wide = self.shapes(site)["gains"][-2:], max(site.fan_in, site.fan_out)
        a = kaiming_uniform((*site.batch, self.rank, narrow), rng)
        b = kaiming_uniform((*site.batch, wide, self.rank * terms), rng)
        return {"a": a, "into_out": b} if site.fan_in <= site.fan_out else {"a": a, "from_in": b.transpose(-1, -2)}

    def working_key(self, site: Site) -> Hashable:
        return site.matrix_shape

    def inner_width(self, p: Any) -> int:
        return int(p.values.shape[-1]) * self.rank

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        inputs = p.values, p.a, p.gains
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            a = self._scaled(*inputs)
        else:  # its products are as large as the weight, and cheap
            a = checkpoint(self._scaled, *inputs, use_reentrant=False, preserve_rng_state=False)
        return (a, p.into_out) if hasattr(p, "into_out") else (p.from_in, a.transpose(-1, -2))

    def _scaled(self, values: Tensor, a: Tensor, gains: Tensor) -> Tensor:
        scaled = values.unsqueeze(-1) * a.unsqueeze(-2) * gains.unsqueeze(-3)
        return self.alpha / self.rank * scaled.flatten(-3, -2)
