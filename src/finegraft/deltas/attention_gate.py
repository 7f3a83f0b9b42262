"""Sigmoid gates on the output of attention (Gated Attention, Qiu et al. 2025, arXiv:2505.06708)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from finegraft.deltas.attention_parts import input_width, query_heads, query_width
from finegraft.deltas.delta import Attend, Delta, Shapes
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("attention-gate")
class AttentionGate(Delta):
    """``o_h * 2 sigmoid(x W_h)`` on what head ``h`` gives, before the output projection.

    ``x`` is what the attention was given at the query's own position. The factor 2 makes zero weights the identity;
    the paper, which trains from scratch, has none. Under grouped keys a gate belongs to a head of queries.

    Attributes:
        per: one gate for each ``head``, ``width * heads`` numbers, or for each ``entry`` of each head.
    """

    kind = "attention-gate"
    on = ("attention",)
    reads_weight: ClassVar[bool] = False

    per: Literal["head", "entry"] = "head"

    def fits(self, site: Site) -> None:
        super().fits(site)
        query_heads(site)
        input_width(site)

    def shapes(self, site: Site) -> Shapes:
        gates = query_heads(site) if self.per == "head" else query_width(site)
        return {"gate": (gates, input_width(site))}

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
        gate = 2 * (call.x @ p.gate.to(call.x.dtype).transpose(0, 1)).sigmoid()
        return y * gate.view(*y.shape[:3], -1).to(y.dtype), weights
