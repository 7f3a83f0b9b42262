"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; He et al. 2022, arXiv:2110.04366)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.errors import SiteError
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds

_STDS = {"houlsby": 1e-2, "bert": 2e-2}


@kinds.register("bottleneck")
class Bottleneck(Delta):
    """``layer(x) + s * up(act(down(z)))`` with ``z = layer(x)`` (serial) or ``z = x`` (parallel).

    On a sublayer (roles ``attn``, ``ffn``) ``x`` is the sublayer's input, and the sum happens before the residual.

    Attributes:
        width: the bottleneck ``r``; ``2 d r + r + d`` numbers at a site of width ``d``.
        placement: ``serial`` or ``parallel``.
        activation: between the two maps.
        scale: the factor ``s``.
        init: ``lora`` (up is zero: exactly the identity), ``houlsby`` (normal 0.01, cut at two deviations) or ``bert``
            (normal 0.02): near the identity.
        dropout: after the activation, in training.
    """

    kind = "bottleneck"
    on = ("linear", "conv", "embedding", "norm", "sublayer")

    width: PositiveInt = 16
    placement: Literal["serial", "parallel"] = "serial"
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    scale: PositiveFloat = 1.0
    init: Literal["lora", "houlsby", "bert"] = "lora"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    reads_weight: ClassVar[bool] = False

    @property
    def starts_as_identity(self) -> bool:
        return self.init == "lora"

    def fits(self, site: Site) -> None:
        super().fits(site)
        if self.placement == "parallel" and (not site.inputs or site.type == "conv"):
            raise SiteError(
                f"a parallel bottleneck needs a vector input; {site.name!r} is a {site.type} site: use serial"
            )

    def shapes(self, site: Site) -> Shapes:
        into = site.inputs if self.placement == "parallel" else site.channels
        return {
            "down": (self.width, into),
            "down_bias": (self.width,),
            "up": (site.channels, self.width),
            "up_bias": (site.channels,),
        }

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        if self.init == "lora":
            return {"down": kaiming_uniform(shapes["down"], rng)}
        std = _STDS[self.init]
        bound = 2 * std if self.init == "houlsby" else 1.0
        draw = {
            n: torch.nn.init.trunc_normal_(torch.empty(shapes[n]), 0, std, -bound, bound, rng) for n in ("down", "up")
        }
        return draw

    def has_effect(self, p: Any, site: Site) -> bool:
        return bool(p.up.any() or p.up_bias.any())

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        y = layer(x)
        z = (x if self.placement == "parallel" else y).movedim(p.op.channels, -1)
        hidden = getattr(F, self.activation)(F.linear(z, p.down.to(z.dtype), p.down_bias.to(z.dtype)))
        hidden = F.dropout(hidden, self.dropout, p.training)
        change = F.linear(hidden, p.up.to(hidden.dtype), p.up_bias.to(hidden.dtype)).movedim(-1, p.op.channels)
        return y + self.scale * change.to(y.dtype)
