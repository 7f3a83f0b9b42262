"""A chain of reflections of the input (HRA, Yuan et al. 2024, arXiv:2405.17484)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from finegraft.deltas.delta import Shapes, precise
from finegraft.deltas.input_map import InputMap
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.low_rank_linear import add_low_rank
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("householder")
class Householder(InputMap):
    """``W H_1 ... H_r`` with ``H_i = I - 2 u_i u_i^T / |u_i|^2``. Neighbours start equal, so that they cancel.

    The product is ``I - U T U^T`` with ``inverse(T) = I / 2 + (what lies above the diagonal of U^T U)``, so that the
    input changes by a matrix of rank ``r``.

    Attributes:
        reflections: their number ``r``; even.
    """

    kind = "householder"

    reflections: Annotated[int, Field(ge=2, multiple_of=2)] = 8

    @property
    def rounds_at_start(self) -> bool:
        return True

    def shapes(self, site: Site) -> Shapes:
        return {"vectors": (*site.batch, self.reflections, self.width(site))}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        half = kaiming_uniform((*site.batch, self.reflections // 2, self.width(site)), rng)
        return {"vectors": half.repeat_interleave(2, dim=-2)}

    def frames(self, p: Any) -> list[Tensor]:
        return [torch.nn.functional.normalize(p.vectors, dim=-1)]

    def turn(self, p: Any, x: Tensor) -> Tensor:
        u, tu = _factors(p.vectors)
        return add_low_rank(x, x, u, -tu.transpose(-1, -2), scale=1.0)

    def turn_back(self, p: Any, x: Tensor) -> Tensor:
        u, tu = (t.to(x.dtype) for t in _factors(p.vectors))
        return x - (x @ tu.transpose(-1, -2)) @ u


def _factors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors ``U^T`` and ``(U T)^T``, both ``(*batch, r, in)``."""
    vectors = precise(vectors)
    u = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    with torch.autocast(u.device.type, enabled=False):
        inverse = (u @ u.transpose(-1, -2)).triu(1) + torch.eye(u.shape[-2], dtype=u.dtype, device=u.device) / 2
        tu = torch.linalg.solve_triangular(inverse.transpose(-1, -2), u, upper=False)
    return u, tu
