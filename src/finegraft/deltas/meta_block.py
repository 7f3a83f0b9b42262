"""Meta networks beside blocks (EcoTTA, Song et al. 2023, arXiv:2303.01904)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("meta-block")
class MetaBlock(Delta):
    """``gain * F(x) + shift + size * relu(W x + b)``, where ``F`` is a block, or a stack of them, of the frozen base.

    Gains start at one and sizes at zero, behind the ReLU, so that it starts as the base and ``W`` still learns: with a
    size before the ReLU nothing would pass it for ever. The paper's batch normalisations are these gains and sizes,
    without statistics, and ``W`` its convolution. ``d^2 + 4 d`` numbers beside a block of width ``d``.
    """

    kind = "meta-block"
    on = ("block", "network")
    reads_weight: ClassVar[bool] = False

    def shapes(self, site: Site) -> Shapes:
        d = site.channels
        return {"gain": (d,), "shift": (d,), "size": (d,), "map": (d, d), "map_bias": (d,)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        return {"gain": torch.ones(shapes["gain"]), "map": kaiming_uniform(shapes["map"], rng)}

    def has_effect(self, p: Any, site: Site) -> bool:
        return bool((p.gain != 1).any() or p.shift.any() or p.size.any())

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        y = layer(x)
        beside = F.relu(F.linear(x, p.map.to(x.dtype), p.map_bias.to(x.dtype)))
        return p.gain.to(y.dtype) * y + p.shift.to(y.dtype) + p.size.to(y.dtype) * beside.to(y.dtype)
