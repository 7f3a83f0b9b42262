"""Attention over the outputs of several adapters (AdapterFusion, Pfeiffer et al. 2021, arXiv:2005.00247)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds

_STD, _OFF_DIAGONAL = 2e-2, 1e-6


@kinds.register("adapter-fusion")
class AdapterFusion(Delta):
    """``y + sum_t a_t V z_t`` with ``z_t = up_t(act(down_t(y)))`` and ``a = softmax_t((Q y + b) . (K z_t + c))``.

    The adapters do not train, and the file holds them. :func:`finegraft.grafting.fusing.fuse` takes those of trained
    grafts; without, they are random.

    Attributes:
        adapters: number of adapters.
        width: bottleneck of each.
        activation: of each.
        scale: the factor on ``z_t``.
    """

    kind = "adapter-fusion"
    on = ("linear", "conv", "embedding", "norm", "sublayer", "block")
    reads_weight: ClassVar[bool] = False

    adapters: PositiveInt = 2
    width: PositiveInt = 16
    activation: Literal["relu", "gelu", "silu", "tanh", "identity"] = "relu"
    scale: PositiveFloat = 1.0

    @property
    def starts_as_identity(self) -> bool:
        return False

    def shapes(self, site: Site) -> Shapes:
        square = (site.channels, site.channels)
        biases: Shapes = {"to_query_bias": (site.channels,), "to_key_bias": (site.channels,)}
        return {"to_query": square, "to_key": square, "to_value": square, **biases}

    def constants(self, site: Site) -> Shapes:
        number, width, channels = self.adapters, self.width, site.channels
        return {
            "down": (number, width, channels),
            "down_bias": (number, width),
            "up": (number, channels, width),
            "up_bias": (number, channels),
        }

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        square = (site.channels, site.channels)
        value = torch.full(square, _OFF_DIAGONAL).fill_diagonal_(1.0)
        queries = {name: _STD * torch.randn(square, generator=rng) for name in ("to_query", "to_key")}
        given = {name: kaiming_uniform(self.constants(site)[name], rng) for name in ("down", "up", "up_bias")}
        return {**queries, "to_value": value, **given}

    def has_effect(self, p: Any, site: Site) -> bool:
        return bool(p.to_value.any() and (p.up.any() or p.up_bias.any()))

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        out = layer(x)
        y = out.movedim(p.op.channels, -1)
        z = self.outputs(p, y)
        query = F.linear(y, p.to_query.to(y.dtype), p.to_query_bias.to(y.dtype))
        key = F.linear(z, p.to_key.to(z.dtype), p.to_key_bias.to(z.dtype))
        share = torch.softmax(torch.einsum("...d,...td->...t", query, key), dim=-1)
        fused = torch.einsum("...t,...td->...d", share.to(z.dtype), z)
        return out + F.linear(fused, p.to_value.to(fused.dtype)).movedim(-1, p.op.channels).to(out.dtype)

    def outputs(self, p: Any, y: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens adapters d"]:
        """What each adapter adds to ``y``."""
        hidden = torch.einsum("...d,trd->...tr", y, p.down.to(y.dtype)) + p.down_bias.to(y.dtype)
        hidden = hidden if self.activation == "identity" else getattr(F, self.activation)(hidden)
        raised = torch.einsum("...tr,tdr->...td", hidden, p.up.to(hidden.dtype))
        return self.scale * (raised + p.up_bias.to(raised.dtype))
