"""Changes of the bias alone, by the bias and the weight beneath (GLoRA, Chavan et al. 2023, arXiv:2306.07967)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("bias-map")
class BiasMap(Delta):
    """``b * (1 + d) + e + W c``, which is the layer's response to a constant ``c`` added to its input.

    All start at zero. A layer without a bias gets one; ``d`` is then left out.

    Attributes:
        gain: whether ``d`` trains.
        shift: whether ``e`` trains.
        prompt: whether ``c`` trains.
        rank: inner width of ``c`` as a product of two factors; None for a vector.
    """

    kind = "bias-map"
    on = ("linear", "conv")
    reads_weight: ClassVar[bool] = True

    gain: bool = True
    shift: bool = True
    prompt: bool = True
    rank: PositiveInt | None = None

    @model_validator(mode="after")
    def _has_effect(self) -> BiasMap:
        if not (self.shift or self.prompt):
            raise ValueError("shift and prompt are both off, so nothing trains where a layer has no bias")
        return self

    def shapes(self, site: Site) -> Shapes:
        found: Shapes = {}
        if self.gain and site.bias is not None:
            found["d"] = (site.channels,)
        if self.shift:
            found["e"] = (site.channels,)
        if self.prompt and self.rank is None:
            found["c"] = (site.fan_in,)
        elif self.prompt and self.rank is not None:
            found |= {"c": (self.rank,), "c_up": (site.fan_in, self.rank)}
        return found

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        return {"c_up": kaiming_uniform(shapes["c_up"], rng)} if "c_up" in shapes else {}

    def weight(self, p: Any, w: Tensor) -> Tensor:
        return w

    def bias_over(self, p: Any, b: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        change = self._change(p, b, weight)
        return change if b is None else b + change.to(b.dtype)

    def _change(self, p: Any, b: Tensor | None, weight: Callable[[], Tensor]) -> Tensor:
        terms = [p.e] if self.shift else []
        if b is not None and hasattr(p, "d"):
            terms.append(b.to(p.d.dtype) * p.d)
        if self.prompt:
            c = p.c if self.rank is None else p.c_up @ p.c
            w = weight()
            terms.append((w @ c.to(w.dtype)).to(c.dtype))
        return torch.stack(terms).sum(0)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        y = layer(x)
        return y + layer.op.on_channels(self._change(p, layer.bias, lambda: layer.weight), y)
