"""Low-rank change of a weight (LoRA, Hu et al. 2021, arXiv:2106.09685, and its kin)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes, precise
from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.registry import inits, kinds


@kinds.register("low-rank")
class LowRank(Delta):
    """``W + s (B A - B0 A0)``, with ``A: (rank, in)`` and ``B: (out, rank)``.

    ``B0 A0`` is the start of inits that take a part of the weight as their factors (PiSSA, OLoRA): subtracting it
    leaves the base untouched. It is absent for the others.

    Attributes:
        rank: inner width.
        alpha: numerator of the scaling ``s``.
        scaling: ``alpha/r``, or ``alpha/sqrt(r)`` (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
        init: a registered start of the factors.
        dropout: on the input of ``A``, in training.
        train_a: whether ``A`` trains (not in LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).
        offset: add a trained offset to the rank-wide product, ``s B (A x + c)`` (AdapterBias, Fu et al. 2022).
    """

    kind = "low-rank"
    on = ("linear", "conv", "embedding", "tensor")

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    init: str = "kaiming"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    train_a: bool = True
    offset: bool = False

    @property
    def scale(self) -> float:
        """The factor ``s``."""
        rank = max(1, self.rank)  # none may be left of a change whose ranks were dropped
        return self.alpha / (rank if self.scaling == "alpha/r" else math.sqrt(rank))

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        axes: dict[str, tuple[int, ...]] = {"a": (-2,), "b": (-1,)}
        if self.offset:
            axes["c"] = (-1,)
        return {**axes, "a0": (-2,), "b0": (-1,)} if inits[self.init].takes_from_weight else axes

    def frames(self, p: Any) -> list[Tensor]:
        return [p.a, p.b.transpose(-1, -2)]

    @property
    def needs(self) -> Literal["covariance", "gradient"] | None:
        return inits[self.init].needs

    @property
    def starts_as_identity(self) -> bool:
        return not inits[self.init].moves

    @property
    def rounds_at_start(self) -> bool:
        return inits[self.init].takes_from_weight

    def fits(self, site: Site) -> None:
        super().fits(site)
        if self.needs == "covariance" and site.type != "linear":
            raise SiteError(f"init {self.init!r} looks at inputs of linear layers; {site.name!r} is a {site.type} site")
        largest = min(site.fan_in, site.fan_out)
        if self.rank > largest:
            raise SiteError(
                f"rank {self.rank} is larger than {site.name!r}, whose matrix is {site.fan_out} x {site.fan_in}: "
                f"use a rank of at most {largest}, or leave this site out"
            )
        if self.offset and site.type != "linear":
            raise SiteError(f"an offset is defined on linear sites; {site.name!r} is a {site.type} site")

    def _factors(self, site: Site) -> Shapes:
        return {"a": (*site.batch, self.rank, site.fan_in), "b": (*site.batch, site.fan_out, self.rank)}

    def shapes(self, site: Site) -> Shapes:
        factors = self._factors(site)
        trained = factors if self.train_a else {"b": factors["b"]}
        return {**trained, "c": (self.rank,)} if self.offset else trained

    def constants(self, site: Site) -> Shapes:
        factors = self._factors(site)
        frozen = {} if self.train_a else {"a": factors["a"]}
        return {**frozen, "a0": factors["a"], "b0": factors["b"]} if inits[self.init].takes_from_weight else frozen

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        a, b = inits[self.init](site, self.rank, self.scale, rng)
        return (
            {"a": a, "b": b, "a0": a.clone(), "b0": b.clone()}
            if inits[self.init].takes_from_weight
            else {"a": a, "b": b}
        )

    def joined(self, p: Any) -> tuple[Tensor, Tensor]:
        """The factors ``A`` and ``B`` of the whole change, with the negative start beside what trains."""
        if not inits[self.init].takes_from_weight:
            return p.a, p.b
        return torch.cat([p.a, p.a0], dim=-2), torch.cat([p.b, -p.b0], dim=-1)

    def change(self, p: Any, dtype: torch.dtype) -> Tensor:
        """The change as a dense matrix."""
        a, b = self.joined(p)
        return (self.scale * (b.to(dtype) @ a.to(dtype))).to(dtype)

    def weight(self, p: Any, w: Tensor) -> Tensor:
        return w + self.change(p, w.dtype)

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        if not self.offset:
            return b
        shift = self.scale * (p.b @ p.c)
        return shift if b is None else b + shift.to(b.dtype)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        a, b = self.joined(p)
        dropout = self.dropout if p.training else 0.0
        y = layer.op.add_low_rank(layer.module, x, layer(x), a, b, scale=self.scale, dropout=dropout)
        return y + layer.op.on_channels(self.scale * (p.b @ p.c), y) if self.offset else y

    @torch.no_grad()
    def row_norms(self, p: Any, layer: Layer) -> Float[Tensor, " out"]:
        """``|W + s B A|`` by rows from ``W A^T`` and ``A A^T``, so that no dense sum is built."""
        w = layer.weight
        if layer.op.out_axis != -2 or w.ndim != 2:
            return super().row_norms(p, layer)
        a, b = (t.to(w.dtype) for t in self.joined(p))
        with torch.autocast(w.device.type, enabled=False):
            cross = torch.linalg.vecdot(precise(w @ a.t()), precise(b))
            own = torch.linalg.vecdot(precise(b) @ precise(a @ a.t()), precise(b))
        square = layer.row_norms().square() + 2 * self.scale * cross + self.scale**2 * own
        return square.clamp_min_(0).sqrt_()
