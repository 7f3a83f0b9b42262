"""Zero-init gated attention to prompts (LLaMA-Adapter, Zhang et al. 2023, arXiv:2303.16199)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.attention_parts import Projections, projections, query_heads, required_projections
from finegraft.deltas.delta import Attend, Delta, Shapes
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("adaption-prompt")
class AdaptionPrompt(Delta):
    """``y + tanh(g) softmax(Q K_P^T / sqrt(d)) V_P``: a softmax of its own over prompts, by a gate for each head.

    ``K_P`` and ``V_P`` are what the base's own layers make of the prompts, without rotation by position. The softmax
    over tokens is untouched, and a gate starts at zero: a fresh change is the identity, and prompts train from the
    second step on.

    Attributes:
        length: prompts.
        squash: whether the gate goes through ``tanh``.
        init_std: standard deviation of the prompts at the start.
    """

    kind = "adaption-prompt"
    on = ("attention",)
    reads_weight: ClassVar[bool] = False

    length: PositiveInt = 10
    squash: bool = True
    init_std: PositiveFloat = 1.0

    def fits(self, site: Site) -> None:
        super().fits(site)
        required_projections(site)
        query_heads(site)

    def shapes(self, site: Site) -> Shapes:
        return {"prompt": (self.length, required_projections(site).width), "gate": (query_heads(site),)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"prompt": torch.randn(self.shapes(site)["prompt"], generator=rng) * self.init_std}

    def has_effect(self, p: Any, site: Site) -> bool:
        return bool(p.gate.any())

    def attend(
        self,
        p: Any,
        call: Attend,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch kv_heads keys width"],
        value: Float[Tensor, "batch kv_heads keys width"],
        mask: Tensor | None,
        **settings: Any,
    ) -> Any:
        y, weights = call(query, key, value, mask, **settings)
        layers = projections(call.module)
        assert isinstance(layers, Projections)
        keys, values = (by_head(table, query, key.shape[1]) for table in layers(p.prompt))
        scores = prefix_scores(query, keys, settings.get("scaling"))
        gate = (torch.tanh(p.gate) if self.squash else p.gate).to(query.dtype).view(-1, 1, 1)
        seen = (gate * torch.softmax(scores, dim=-1)) @ values
        return y + seen.transpose(1, 2).to(y.dtype), weights


def by_head(
    table: Float[Tensor, "length kv_width"], query: Tensor, kv_heads: int
) -> Float[Tensor, "heads length width"]:
    """A table of keys or values, by the head of queries that attends to it."""
    found = table.to(query.dtype).reshape(len(table), kv_heads, -1).transpose(0, 1)
    return found.repeat_interleave(query.shape[1] // kv_heads, dim=0)


def prefix_scores(
    query: Tensor, keys: Float[Tensor, "heads length width"], scaling: float | None
) -> Float[Tensor, "batch heads queries length"]:
    """Scaled products of queries and trained keys."""
    return query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
