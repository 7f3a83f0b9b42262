"""Adapters of random features (Scalable Neural Network Kernels, Sehanobish et al. 2024, arXiv:2310.13225)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.errors import SiteError
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("random-features")
class RandomFeatures(Delta):
    """``layer(x) + v * (P phi(z))`` with ``phi(z) = relu(G [z, 1]) / sqrt(m)`` for a fixed normal ``G``.

    Inner products of ``phi`` estimate the arc-cosine kernel of degree one, up to a factor. ``P: (out, m)`` and
    the gate ``v``, which starts at zero, train: ``out (m + 1)`` numbers, whatever the width of ``z``. ``G`` is
    ``(m, width + 1)``, follows from the seed, is the same at all sites of a width, and is in no file.

    Attributes:
        features: ``m``; drawn as pairs of opposite directions, of which one answers whatever the input is.
        placement: ``z`` is the layer's output (``serial``) or its input (``parallel``).
        seed: of ``G``.
    """

    kind = "random-features"
    on = ("linear", "conv", "embedding", "norm", "sublayer")
    reads_weight: ClassVar[bool] = False

    features: Annotated[int, Field(ge=2)] = 32
    placement: Literal["serial", "parallel"] = "serial"
    seed: NonNegativeInt = 0

    def fits(self, site: Site) -> None:
        super().fits(site)
        if self.placement == "parallel" and (not site.inputs or site.type == "conv"):
            raise SiteError(
                f"features of the input need a vector; {site.name!r} is a {site.type} site: use placement: serial"
            )

    def _width(self, site: Site) -> int:
        return site.inputs if self.placement == "parallel" else site.channels

    def shapes(self, site: Site) -> Shapes:
        return {"readout": (site.channels, self.features), "gate": (site.channels,)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"readout": kaiming_uniform((site.channels, self.features), rng)}

    def working(self, site: Site) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(-(-self.features // 2), self._width(site) + 1, generator=rng)
        return {"directions": torch.cat([drawn, -drawn])[: self.features]}

    def working_key(self, site: Site) -> Hashable:
        return self._width(site)

    def has_effect(self, p: Any, site: Site) -> bool:
        return bool((p.gate.unsqueeze(-1) * p.readout).any())

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        y = layer(x)
        z = (x if self.placement == "parallel" else y).movedim(p.op.channels, -1)
        readout = (p.gate.unsqueeze(-1) * p.readout).to(z.dtype)
        change = F.linear(features(z, p.directions.to(z.dtype)), readout)
        return y + change.movedim(-1, p.op.channels).to(y.dtype)


def features(z: Tensor, directions: Tensor) -> Tensor:
    """``relu(G [z, 1]) / sqrt(m)``."""
    hidden = F.linear(z, directions[:, :-1], directions[:, -1])
    return torch.relu(hidden) / math.sqrt(len(directions))
