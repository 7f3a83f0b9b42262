"""Adapters that pass messages along an attention map (p-Adapter, Wu et al. 2023, arXiv:2312.10613)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.attention_parts import query_heads, query_width
from finegraft.deltas.delta import Attend, Delta, Shapes
from finegraft.errors import SiteError
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds

_EPSILON = 1e-8

Heads = Float[Tensor, "batch heads positions width"]
Map = Float[Tensor, "batch heads queries keys"]


@kinds.register("graph-adapter")
class GraphAdapter(Delta):
    """``h + U (gelu(G h) * F')`` on each head's output ``h``, with messages ``F'`` of a p-Laplacian on its attention.

    Queries and values are the nodes of a bipartite graph with the attention probabilities ``A`` for edges and features
    ``D q`` and ``D v``. Edges are weighed anew, ``w = A (sqrt(A) ||F_i - F_j||)^(p - 2)``, and a query's message is the
    mean of its neighbours' features under ``w`` and its own under ``2 mu / p``; ``p`` and ``mu`` train for the site.

    Attributes:
        width: numbers of a message over all heads, rounded down to a multiple of them, one each at least.
        p: at the start; 2 weighs by attention alone.
    """

    kind = "graph-adapter"
    on = ("attention",)
    reads_weight: ClassVar[bool] = False

    width: PositiveInt = 16
    p: PositiveFloat = 1.25

    def fits(self, site: Site) -> None:
        super().fits(site)
        if not site.shape:
            raise SiteError(f"the width of the keys of {site.name!r} could not be worked out, so no adapter fits it")

    def shapes(self, site: Site) -> Shapes:
        heads = query_heads(site)
        inner, width = max(1, self.width // heads), query_width(site) // heads
        maps = {name: (heads, inner, width) for name in ("down", "gating")}
        return {**maps, "up": (heads, width, inner), "power": (1,), "self_weight": (1,)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        drawn = {name: kaiming_uniform(self.shapes(site)[name], rng) for name in ("down", "gating")}
        return drawn | {"power": torch.full((1,), self.p)}

    def has_effect(self, p: Any, site: Site) -> bool:
        return bool(p.up.any())

    def attend(
        self, p: Any, call: Attend, query: Heads, key: Heads, value: Heads, mask: Tensor | None, **settings: Any
    ) -> Any:
        y, weights = call(query, key, value, mask, **settings)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        edges = probabilities(query, key, mask, **settings)
        down = p.down.to(query.dtype).transpose(-1, -2)
        message = laplacian(edges, query @ down, value @ down, p.power, 0.1 * (2 + torch.tanh(p.self_weight)))
        h = y.transpose(1, 2)
        gates = F.gelu(h @ p.gating.to(h.dtype).transpose(-1, -2))
        change = (gates * message.to(h.dtype)) @ p.up.to(h.dtype).transpose(-1, -2)
        return y + change.transpose(1, 2), weights


def laplacian(edges: Map, queries: Heads, values: Heads, p: Tensor, mu: Tensor) -> Heads:
    """Messages of the queries, whose own features count by ``2 mu / p``."""
    gaps = queries.square().sum(-1, keepdim=True) + values.square().sum(-1).unsqueeze(-2)
    gaps = (gaps - 2 * queries @ values.transpose(-1, -2)).clamp_min(0)
    w = edges * (edges * gaps + _EPSILON) ** ((p - 2) / 2)
    own = 2 * mu / p
    return (w @ values + own * queries) / (w.sum(-1, keepdim=True) + own)


def probabilities(query: Heads, key: Heads, mask: Tensor | None, **settings: Any) -> Map:
    """The attention map of a call."""
    scale = settings.get("scaling")
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if settings.get("position_bias") is not None:
        scores = scores + settings["position_bias"]
    if mask is None and settings["is_causal"] and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return scores.float().softmax(dim=-1).to(query.dtype) if query.dtype != torch.float64 else scores.softmax(dim=-1)
