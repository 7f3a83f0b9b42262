"""A sparse matrix in the fixed basis of the singular vectors (SVFT, Lingam et al. 2024, arXiv:2405.19597)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Int
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.core import drawing
from finegraft.deltas.delta import Layer, Shapes
from finegraft.deltas.fixed_factors import add_between
from finegraft.errors import SiteError
from finegraft.inits.decompose import check_decomposable, singular_triplets
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("spectral")
class Spectral(Factored):
    """``W + U M V^T`` with all singular vectors and a sparse ``M``, whose entries train from zero.

    ``U`` and ``V`` follow from the base and are in no file.

    Attributes:
        support: where ``M`` may differ from zero: on the diagonal and ``band`` lines on either side (``banded``), or as
            many entries ``random`` or at the largest of ``U V^T`` (``top``), for equal budgets. Where ``U V^T`` is not
            square, ``top`` takes the square one of ``U`` and ``V^T``.
        band: lines on either side of the diagonal; 0 trains the singular values alone.
        rank: use the leading triplets only; None for all.
        seed: of the random support.
    """

    kind = "spectral"

    support: Literal["banded", "random", "top"] = "banded"
    band: NonNegativeInt = 0
    rank: PositiveInt | None = None
    seed: NonNegativeInt = 0

    def fits(self, site: Site) -> None:
        super().fits(site)
        check_decomposable(site)
        most = min(site.fan_in, site.fan_out)
        if (self.rank or 1) > most:
            raise SiteError(f"{site.name!r} has {most} singular values, fewer than the rank {self.rank}: use less")

    def _size(self, site: Site) -> tuple[int, int]:
        """Width of ``M``, and entries that train."""
        n = self.rank or min(site.fan_in, site.fan_out)
        band = min(self.band, n - 1)
        return n, n * (2 * band + 1) - band * (band + 1)

    def shapes(self, site: Site) -> Shapes:
        return {"values": (*site.batch, self._size(site)[1])}

    def working(self, site: Site) -> dict[str, Tensor]:
        u, _, v = singular_triplets(site, self.rank)
        return {"u": u.contiguous(), "v": v.contiguous(), "index": self._index(site, u, v)}

    def _index(self, site: Site, u: Tensor, v: Tensor) -> Int[Tensor, "*batch count"]:
        n, count = self._size(site)
        if self.support == "top":
            square = u @ v if site.fan_out == site.fan_in else u if site.fan_out < site.fan_in else v
            return square[..., :n, :n].flatten(-2).topk(count).indices.sort().values
        if self.support == "random":
            places = torch.randperm(n * n, generator=drawing(self.seed, site))[:count].sort().values
        else:
            row, column = torch.arange(n).unsqueeze(-1), torch.arange(n)
            places = ((row - column).abs() <= self.band).flatten().nonzero().squeeze(-1)
        return places.expand(*site.batch, count).contiguous()

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        n = p.v.shape[-2]
        if self.band == 0 and self.support == "banded":
            return p.values.unsqueeze(-1) * p.v, p.u
        middle = p.values.new_zeros(*p.values.shape[:-1], n * n).scatter(-1, p.index, p.values).unflatten(-1, (n, n))
        return middle @ p.v, p.u

    def inner_width(self, p: Any) -> int:
        return int(p.v.shape[-2])

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        diagonal = self.band == 0 and self.support == "banded"
        if not diagonal or layer.op.type != "linear" or self.dense_takes_less(p, layer, x):
            return super().forward(p, layer, x)
        return add_between(x, layer(x), p.v, p.u, p.values)
