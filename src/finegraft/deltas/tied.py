"""Blocks tied to each other, with low-rank changes of each (Relaxed Recursive Transformers, arXiv:2410.20672)."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import MATRICES
from finegraft.deltas.delta import Delta, Layer, Shapes, precise
from finegraft.deltas.rebuilding import rebuilding_weight
from finegraft.deltas.shared_low_rank import same_role
from finegraft.errors import SiteError
from finegraft.inits.decompose import check_decomposable, leading_triplets
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("tied")
class Tied(Delta):
    """``W_shared + B A`` in place of the weight: blocks ``blocks`` apart have ``W_shared`` in common, and train it.

    Changes beneath it do not act; put others on top.

    It starts as the mean of their weights, and ``B A`` as the best approximation of what each differs by: a rank as
    large as that of the differences starts as the identity. Numbers: ``out in`` for each of the ``blocks``, and
    ``rank (in + out)`` at each site.

    Attributes:
        blocks: distinct blocks; as many as there are, or more, tie none.
        rank: of the changes; 0 is tying alone.
    """

    kind = "tied"
    on = MATRICES
    hides = True

    blocks: PositiveInt = 3
    rank: NonNegativeInt = 8

    @property
    def starts_as_identity(self) -> bool:
        return False

    def fits(self, site: Site) -> None:
        super().fits(site)
        check_decomposable(site)
        if self.rank > min(site.fan_in, site.fan_out):
            raise SiteError(
                f"rank {self.rank} is larger than {site.name!r}, whose matrix is {site.fan_out} x {site.fan_in}: "
                f"use a rank of at most {min(site.fan_in, site.fan_out)}"
            )

    def sharing(self, site: Site) -> dict[str, str]:
        return {"common": self._tie(site)}

    def _tie(self, site: Site) -> str:
        return site.name if site.layer is None else f"{same_role(site)} {self._place(site)} {site.layer % self.blocks}"

    @staticmethod
    def _place(site: Site) -> str:
        """The site's name within its block."""
        return site.name.removeprefix(site.block)

    def shapes(self, site: Site) -> Shapes:
        a, b = (*site.batch, self.rank, site.fan_in), (*site.batch, site.fan_out, self.rank)
        return {"common": site.matrix_shape, **({"a": a, "b": b} if self.rank else {})}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        tied = [peer for peer in site.peers if self._tie(peer) == self._tie(site)] or [site]
        common = torch.stack([precise(peer.base_weight) for peer in tied]).mean(0)
        start = {"common": common} if tied[0].name == site.name else {}  # others borrow that of the first
        if not self.rank:
            return start
        u, s, vh = leading_triplets(precise(site.base_weight) - common, self.rank)
        return start | {"a": vh, "b": u * s.unsqueeze(-2)}

    def weight(self, p: Any, w: Tensor) -> Tensor:
        common = p.common.to(w.device)
        return (common + p.b @ p.a if self.rank else common.clone()).to(w.dtype)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        return rebuilding_weight(self, p, layer, x)
