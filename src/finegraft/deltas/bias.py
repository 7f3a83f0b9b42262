"""Biases alone (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("bias")
class Bias(Delta):
    """``y + d`` by output channel; a layer without a bias gets one that starts at zero. Backward keeps no input."""

    kind = "bias"
    on = ("linear", "conv", "embedding", "norm")

    def shapes(self, site: Site) -> Shapes:
        return {"bias": (site.channels,)}

    def weight(self, p: Any, w: Tensor) -> Tensor:
        return w

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        return p.bias if b is None else b + p.bias.to(b.dtype)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        y = layer(x)
        return y + layer.op.on_channels(p.bias, y)
