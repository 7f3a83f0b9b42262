"""Gates on the features that a part of the base gives (VL-PET, Hu et al. 2023, arXiv:2308.09804)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.errors import SiteError
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("feature-gate")
class FeatureGate(Delta):
    """``G * layer(x)`` with a gate that looks at ``x`` and at ``h = layer(x)``.

    Attributes:
        gate: ``element``, ``sigmoid(gelu(x D) U + b)`` for each number; ``token``, ``sigmoid((x + h) w + b)``;
            ``sample``, ``sigmoid`` of the mean over tokens of ``x w_1 + h w_2 + b``; ``channel``, ``1 + v``.
        width: inner width of ``element``.
        start: what the sigmoid is of at the start, beside what the input adds: at 0 it halves the stream, as in the
            paper; 5 lets it pass nearly whole.
    """

    kind = "feature-gate"
    on = ("linear", "sublayer", "block")
    reads_weight: ClassVar[bool] = False

    gate: Literal["channel", "element", "token", "sample"] = "channel"
    width: PositiveInt = 16
    start: float = 0.0

    @property
    def starts_as_identity(self) -> bool:
        return self.gate == "channel"

    def fits(self, site: Site) -> None:
        super().fits(site)
        if self.gate == "token" and site.inputs != site.channels:
            raise SiteError(
                f"a gate for each token adds what goes in and what comes out: {site.name!r} takes {site.inputs} and "
                f"gives {site.channels}; use another gate"
            )

    def shapes(self, site: Site) -> Shapes:
        if self.gate == "channel":
            return {"gain": (site.channels,)}
        if self.gate == "element":
            return {"down": (self.width, site.inputs), "up": (site.channels, self.width), "offset": (site.channels,)}
        widths: Shapes = {"score": (site.channels,), "offset": (1,)}
        return widths if self.gate == "token" else {"score_in": (site.inputs,), **widths}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        drawn = {name: kaiming_uniform(shape, rng) for name, shape in shapes.items() if name not in ("gain", "offset")}
        return drawn | {name: torch.full(shape, self.start) for name, shape in shapes.items() if name == "offset"}

    def has_effect(self, p: Any, site: Site) -> bool:
        return self.gate != "channel" or bool(p.gain.any())

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        h = layer(x)
        if self.gate == "channel":
            return h * (1 + p.gain.to(h.dtype))
        return h * torch.sigmoid(self._logits(p, x, h))

    def _logits(self, p: Any, x: Tensor, h: Tensor) -> Tensor:
        offset = p.offset.to(h.dtype)
        if self.gate == "element":
            hidden = F.gelu(F.linear(x, p.down.to(x.dtype)))
            return F.linear(hidden, p.up.to(hidden.dtype)).to(h.dtype) + offset
        if self.gate == "token":
            return ((x + h) @ p.score.to(h.dtype)).unsqueeze(-1) + offset
        scores = x @ p.score_in.to(x.dtype) + h @ p.score.to(h.dtype)
        mean = scores.mean(dim=tuple(range(1, scores.ndim)), keepdim=True) if scores.ndim > 1 else scores
        return mean.unsqueeze(-1) + offset
