"""Attention to trained tokens beside a sublayer (Approximated Prompt Tuning, Wu et al. 2023, arXiv:2306.16115)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("token-memory")
class TokenMemory(Delta):
    """``exp(c) (y + m e)`` with ``e = S M``, ``S = relu(x (M + M W_1 W_2)^T)`` and ``m`` the largest entry of ``S``.

    ``x`` is what the sublayer takes and ``y`` what it gives; ``m`` is taken at each position and gets no gradient. It
    stands for a prompt of ``tokens`` positions at a cost that is linear in the length of the input.

    Attributes:
        tokens: rows of ``M``.
        rank: inner width of ``W_1 W_2``.
        init_std: standard deviation of ``M`` at the start, which is not quite the identity.
    """

    kind = "token-memory"
    on = ("sublayer",)
    reads_weight: ClassVar[bool] = False

    tokens: PositiveInt = 200
    rank: PositiveInt = 4
    init_std: PositiveFloat = 0.02

    @property
    def starts_as_identity(self) -> bool:
        return False

    @property
    def passes_straight(self) -> bool:
        return True

    def fits(self, site: Site) -> None:
        super().fits(site)
        if site.fan_in != site.fan_out:
            raise SiteError(f"{site.name!r} takes and gives vectors of two widths: there are the {site.shape}")

    def shapes(self, site: Site) -> Shapes:
        width = site.fan_in
        return {"memory": (self.tokens, width), "down": (width, self.rank), "up": (self.rank, width), "scale": (1,)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        memory = torch.randn(shapes["memory"], generator=rng) * self.init_std
        return {"memory": memory, "down": torch.randn(shapes["down"], generator=rng)}

    def has_effect(self, p: Any, site: Site) -> bool:
        return bool(p.memory.any() or p.scale.any())

    def forward(self, p: Any, layer: Layer, x: Float[Tensor, "... width"]) -> Tensor:
        y = layer(x)
        memory = p.memory.to(y.dtype)
        keys = memory + memory @ p.down.to(y.dtype) @ p.up.to(y.dtype)
        scores = torch.relu(x.to(y.dtype) @ keys.T)
        strongest = scores.amax(dim=-1, keepdim=True).detach()
        return p.scale.exp().to(y.dtype) * (y + scores @ memory * strongest)
