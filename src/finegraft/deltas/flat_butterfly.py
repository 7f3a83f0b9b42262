"""Blocks of a weight in the pattern of a butterfly (Pixelated Butterfly, Chen et al. 2022, arXiv:2112.00029)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from jaxtyping import Int
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import Additive
from finegraft.deltas.delta import Shapes
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("flat-butterfly")
class FlatButterfly(Additive):
    """``W + D`` with ``D`` zero but for blocks ``(i, j)`` on the diagonal and where ``i`` and ``j`` differ in one bit.

    Bits are counted modulo ``s``, the largest power of two that is no more than the blocks of the shorter side, so that
    the pattern repeats along the longer. A row of blocks has ``1 + factors`` of every ``s``. ``D`` starts at zero.

    Attributes:
        block: edge of a block; where it does not divide both ``out`` and ``in``, the largest below that does.
        factors: how many of the lowest bits may differ, at most all.
    """

    kind = "flat-butterfly"

    block: PositiveInt = 32
    factors: NonNegativeInt = 2

    def _edge(self, site: Site) -> int:
        common = math.gcd(site.fan_in, site.fan_out)
        return max(n for n in range(1, min(self.block, common) + 1) if common % n == 0)

    def _places(self, site: Site) -> Int[Tensor, "2 count"]:
        edge = self._edge(site)
        rows, columns = site.fan_out // edge, site.fan_in // edge
        size = 1 << (min(rows, columns).bit_length() - 1)
        differ = (torch.arange(rows).unsqueeze(1) % size) ^ (torch.arange(columns) % size)
        allowed = [0, *(1 << bit for bit in range(min(self.factors, size.bit_length() - 1)))]
        return torch.isin(differ, torch.tensor(allowed)).nonzero().t().contiguous()

    def shapes(self, site: Site) -> Shapes:
        return {"blocks": (*site.batch, self._places(site).shape[1], self._edge(site), self._edge(site))}

    def working(self, site: Site) -> dict[str, Tensor]:
        edge = self._edge(site)
        frame = torch.empty(site.fan_out // edge, site.fan_in // edge, 0)  # of no numbers: its shape counts blocks
        return {"places": self._places(site), "frame": frame}

    def working_key(self, site: Site) -> Hashable:
        return site.matrix_shape

    def change(self, p: Any) -> Tensor:
        rows, columns, _ = p.frame.shape
        blocks, index = p.blocks, p.places[0] * columns + p.places[1]
        whole = blocks.new_zeros(*blocks.shape[:-3], rows * columns, *blocks.shape[-2:]).index_copy(-3, index, blocks)
        return whole.unflatten(-3, (rows, columns)).transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def act(self, p: Any, x: Tensor) -> Tensor:
        rows, columns, _ = p.frame.shape
        edge = p.blocks.shape[-1]
        taken = x.reshape(-1, columns, edge).index_select(1, p.places[1])
        products = torch.einsum("tpi,poi->tpo", taken, p.blocks.to(x.dtype))
        summed = products.new_zeros(len(taken), rows, edge).index_add(1, p.places[0], products)
        return summed.view(*x.shape[:-1], rows * edge)
