"""Training inside a decomposition of the weight (LoLDU, Spectral Adapter, SORSA)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Shapes
from finegraft.errors import SiteError
from finegraft.inits.decompose import check_decomposable, ldu, singular_triplets
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("triplets")
class Triplets(Factored):
    """``W + s (U + a) diag(S + g) (V + c)^T - U diag(S) V^T`` for a part ``U diag(S) V^T`` of the weight.

    What trains are the differences ``a: (out, r)``, ``c: (r, in)``, ``g: (r,)`` and ``s - 1``: a fresh change is the
    identity. The parts of the weight follow from the base and are in no file.

    Attributes:
        rank: how many triplets ``r``.
        basis: singular vectors and values, or columns, pivots and rows of ``P L D U``.
        first: number of the first triplet, to give grafts windows of the spectrum of their own.
        train: the ``values``, the ``vectors`` on both sides, or ``both``.
        learned_scale: whether ``s`` trains.
    """

    kind = "triplets"

    rank: PositiveInt = 8
    basis: Literal["singular", "ldu"] = "singular"
    first: NonNegativeInt = 0
    train: Literal["values", "vectors", "both"] = "both"
    learned_scale: bool = False

    @model_validator(mode="after")
    def _windows_are_singular(self) -> Triplets:
        if self.basis == "ldu" and self.first:
            raise ValueError("first is defined for the singular basis, whose values have an order")
        return self

    def fits(self, site: Site) -> None:
        super().fits(site)
        most = min(site.fan_in, site.fan_out)
        if self.first + self.rank > most:
            raise SiteError(
                f"{site.name!r} has {most} triplets, fewer than first + rank = {self.first + self.rank}: "
                "use a smaller rank, or leave this site out"
            )
        check_decomposable(site)

    def shapes(self, site: Site) -> Shapes:
        shapes: Shapes = {} if self.train == "vectors" else {"values": (*site.batch, self.rank)}
        if self.train != "values":
            shapes |= {"a": (*site.batch, site.fan_out, self.rank), "c": (*site.batch, self.rank, site.fan_in)}
        return shapes | ({"scale": (*site.batch, 1)} if self.learned_scale else {})

    def working(self, site: Site) -> dict[str, Tensor]:
        parts = ldu(site, self.rank) if self.basis == "ldu" else singular_triplets(site, self.rank, self.first)
        return dict(zip(("u", "s", "v"), (t.contiguous() for t in parts), strict=True))

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        trained = {} if self.train == "vectors" else {"values": (-1,)}
        trained |= {} if self.train == "values" else {"a": (-1,), "c": (-2,)}
        return {**trained, "u": (-1,), "s": (-1,), "v": (-2,)}

    def frames(self, p: Any) -> list[Tensor]:
        return [] if self.train == "values" else [(p.u + p.a).transpose(-1, -2), p.v + p.c]

    def inner_width(self, p: Any) -> int:
        return self.rank * (1 if self.train == "values" else 2)

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        values = p.s if self.train == "vectors" else p.s + p.values
        moved = values if not self.learned_scale else values * (1 + p.scale)
        shift = (moved - p.s).unsqueeze(-1) * p.v
        if self.train == "values":
            return shift, p.u
        turned = moved.unsqueeze(-1) * p.c
        return torch.cat([shift + turned, moved.unsqueeze(-1) * p.v + turned], dim=-2), torch.cat([p.u, p.a], dim=-1)
