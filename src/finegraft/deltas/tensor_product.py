"""Low-rank factors whose columns are sums of tensor products (TLoRA, Su et al. 2024, arXiv:2405.16671)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Shapes
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("tensor-product")
class TensorProduct(Factored):
    """``W + (alpha / rank) B A`` where each row (column) is ``sum_i kron(w_i1, ..., w_iN)``, cut to its width.

    The short vectors have the least length ``q`` with ``q^N`` no less than the width, so that a factor trains
    ``order terms q rank`` numbers. The last vectors of ``B`` start at zero.

    Attributes:
        rank: inner width of ``B A``.
        order: ``N``, vectors of a product.
        terms: products of a sum.
        alpha: numerator of the scaling.
    """

    kind = "tensor-product"

    rank: PositiveInt = 8
    order: PositiveInt = 2
    terms: PositiveInt = 4
    alpha: PositiveFloat = 16.0

    def shapes(self, site: Site) -> Shapes:
        sides = {"a": site.fan_in, "b": site.fan_out}
        return {n: (*site.batch, self.order, self.terms, self._length(w), self.rank) for n, w in sides.items()}

    def _length(self, width: int) -> int:
        length = max(1, round(width ** (1 / self.order)) - 1)
        while length**self.order < width:
            length += 1
        return length

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        a, b = (torch.randn(shapes[name], generator=rng) for name in ("a", "b"))
        b[..., -1, :, :, :] = 0
        return {"a": a * (1 / (3 * site.fan_in * self.terms)) ** (0.5 / self.order), "b": b}

    def working(self, site: Site) -> dict[str, Tensor]:
        return {"frame": torch.empty(site.fan_out, site.fan_in, 0)}  # of no numbers: its shape says where to cut

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        out, into, _ = p.frame.shape
        a, b = expanded(p.a)[..., :into, :], expanded(p.b)[..., :out, :]
        return a.transpose(-1, -2), self.alpha / self.rank * b


def expanded(vectors: Float[Tensor, "*batch order terms q rank"]) -> Float[Tensor, "*batch width rank"]:
    """Sums of tensor products, the last vector running fastest."""
    first, *others = vectors.unbind(-4)
    for vector in others:
        first = (first.unsqueeze(-2) * vector.unsqueeze(-3)).flatten(-3, -2)
    return first.sum(-3)
