"""Low-rank changes of a pruned weight that keep its zeros.

MaskLoRA, Zimmer et al. 2023 (PERP), arXiv:2312.15230; LoRS, Hu et al. 2025, arXiv:2501.08582.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.deltas.low_rank import LowRank
from finegraft.deltas.rebuilding import rebuilding_weight
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("masked-low-rank")
class MaskedLowRank(Delta):
    """``W + s (W != 0) * (B A)``: zeros of the weight stay zero. No dense tensor is kept from forward to backward.

    Attributes:
        rank: inner width.
        alpha: numerator of the scaling ``s``.
        scaling: ``alpha/r`` or ``alpha/sqrt(r)``.
        init: a registered start of the factors.
        gradient: ``exact``, or ``straight-through``, in which the factors' gradients pass over the mask, as in LoRS,
            and no dense gradient of the weight is formed.
    """

    kind = "masked-low-rank"
    on = LowRank.on
    reads_weight: ClassVar[bool] = True

    rank: PositiveInt = 8
    alpha: PositiveFloat = 8.0
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    init: str = "kaiming"
    gradient: Literal["exact", "straight-through"] = "exact"

    @cached_property
    def factors(self) -> LowRank:
        """The change without the mask."""
        settings: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "scaling": self.scaling, "init": self.init}
        return LowRank.model_construct(**settings)  # checked here already, but for a rank of 0, where none is left

    @property
    def needs(self) -> Literal["covariance", "gradient"] | None:
        return self.factors.needs

    @property
    def rounds_at_start(self) -> bool:
        return self.factors.rounds_at_start

    def fits(self, site: Site) -> None:
        super().fits(site)
        self.factors.fits(site)

    def shapes(self, site: Site) -> Shapes:
        return self.factors.shapes(site)

    def constants(self, site: Site) -> Shapes:
        return self.factors.constants(site)

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return self.factors.initial(site, rng)

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        return self.factors.rank_axes

    def weight(self, p: Any, w: Tensor) -> Tensor:
        change = self.factors.change(p, w.dtype)
        if self.gradient == "exact":
            return w + torch.where(w != 0, change, 0)
        masked = torch.where(w != 0, change.detach(), 0)
        return w + masked + (change - change.detach())

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        if self.gradient == "exact":
            return rebuilding_weight(self, p, layer, x)
        y = rebuilding_weight(self, _Fixed(p), layer, x)
        a, b = self.factors.joined(p)
        through = layer.op.add_low_rank(
            layer.module, x.detach(), y.detach(), a, b, scale=self.factors.scale, dropout=0.0
        )
        return y + (through - through.detach())


class _Fixed:
    """The tensors of a change, without gradient."""

    def __init__(self, p: Any) -> None:
        self._p = p

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._p, name)
        return found.detach() if isinstance(found, Tensor) else found
