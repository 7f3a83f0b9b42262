"""Learned scale and shift of features.

(IA)^3, Liu et al. 2022, arXiv:2205.05638; SSF, Lian et al. 2022, arXiv:2210.08823.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, model_validator
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes, along_out
from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("scale-shift")
class ScaleShift(Delta):
    """``(1 + g) * y + h`` on a layer's output, or ``layer((1 + g) * x)`` on its input.

    Attributes:
        side: ``out`` or ``in``.
        scale: whether ``g`` trains.
        shift: whether ``h`` trains; only on the output.
        init_std: standard deviation of ``g`` and ``h`` at the start; 0 starts as the identity.
    """

    kind = "scale-shift"

    side: Literal["out", "in"] = "out"
    scale: bool = True
    shift: bool = False
    init_std: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _has_effect(self) -> ScaleShift:
        if not (self.scale or self.shift):
            raise ValueError("scale and shift are both off, so nothing would train")
        if self.shift and self.side == "in":
            raise ValueError("a shift is defined on side 'out' only")
        return self

    @property
    def starts_as_identity(self) -> bool:
        return self.init_std == 0

    def fits(self, site: Site) -> None:
        super().fits(site)
        if self.side == "in" and (
            not site.inputs or (site.type == "conv" and site.fan_in != site.inputs * math.prod(site.shape[2:]))
        ):
            raise SiteError(f"scaling the input is not defined on {site.name!r}, a {site.type} site; use side: out")
        if self.shift and site.type == "tensor":
            raise SiteError(f"a shift needs a layer; {site.name!r} is a bare tensor")

    def shapes(self, site: Site) -> Shapes:
        width = (*site.batch, site.channels if self.side == "out" else site.inputs)
        return {name: width for name, on in (("scale", self.scale), ("shift", self.shift)) if on}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        if self.init_std == 0:
            return {}
        return {n: torch.randn(shape, generator=rng) * self.init_std for n, shape in self.shapes(site).items()}

    def weight(self, p: Any, w: Tensor) -> Tensor:
        if not self.scale:
            return w
        if self.side == "out":
            return w * (1 + along_out(p.scale, p.op, w.dtype))
        gain = 1 + p.scale.to(w.dtype)
        return w * gain.repeat_interleave(w.shape[-1] // gain.shape[-1], dim=-1).unsqueeze(-2)

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        if self.side == "in":
            return b
        if b is not None and self.scale:
            b = b * (1 + p.scale.to(b.dtype))
        if not self.shift:
            return b
        return p.shift if b is None else b + p.shift.to(b.dtype)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        if self.side == "in":
            gain = 1 + p.scale.to(x.dtype)
            return layer(x * (gain.view(-1, *[1] * (x.ndim - 2)) if p.op.type == "conv" else gain))
        y = layer(x)
        if self.scale:
            y = y * (1 + layer.op.on_channels(p.scale, y))
        return y + layer.op.on_channels(p.shift, y) if self.shift else y
