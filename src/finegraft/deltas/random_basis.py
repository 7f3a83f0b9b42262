"""Trained vectors around random factors (VeRA, Kopiczko et al. 2024, arXiv:2310.11454; AFLoRA, Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Layer, Shapes
from finegraft.deltas.fixed_factors import add_between
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("random-basis")
class RandomBasis(Factored):
    """``W + diag(e) B diag(d) A`` with random ``A: (rank, in)`` and ``B: (out, rank)``; ``e`` starts at zero.

    Frozen factors follow from the seed, are the same at all sites of the same sizes, and are in no file.

    Attributes:
        rank: inner width.
        frozen: whether ``A`` and ``B`` stay as they are.
        seed: of frozen factors.
        inner_start: value of ``d`` at the start.
    """

    kind = "random-basis"

    rank: PositiveInt = 256
    frozen: bool = True
    seed: NonNegativeInt = 0
    inner_start: PositiveFloat = 0.1

    def _factor_shapes(self, site: Site) -> Shapes:
        return {"a": (*site.batch, self.rank, site.fan_in), "b": (*site.batch, site.fan_out, self.rank)}

    def shapes(self, site: Site) -> Shapes:
        vectors = {"d": (*site.batch, self.rank), "e": (*site.batch, site.fan_out)}
        return vectors if self.frozen else self._factor_shapes(site) | vectors

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        start = {"d": torch.full((*site.batch, self.rank), self.inner_start)}
        return start if self.frozen else self._drawn(site, rng) | start

    def working(self, site: Site) -> dict[str, Tensor]:
        return self._drawn(site, torch.Generator().manual_seed(self.seed)) if self.frozen else {}

    def working_key(self, site: Site) -> Hashable:
        return site.matrix_shape if self.frozen else None

    def _drawn(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {name: kaiming_uniform(shape, rng) for name, shape in self._factor_shapes(site).items()}

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        return {} if self.frozen else {"a": (-2,), "b": (-1,), "d": (-1,)}

    def inner_width(self, p: Any) -> int:
        return self.rank

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        if not self.frozen or layer.op.type != "linear" or self.dense_takes_less(p, layer, x):
            return super().forward(p, layer, x)
        return add_between(x, layer(x), p.a, p.b, p.d, p.e)

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        # All that trains on one side: the other then needs no gradient, and the input is not kept.
        return p.a, p.e.unsqueeze(-1) * p.b * p.d.unsqueeze(-2)
