"""Which tokens go through a part of the base.

CoDA, Lei et al. 2023, arXiv:2304.04947; Dynamic Tuning, Zhao et al. 2024, arXiv:2403.11808.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Needed, Shapes, precise
from finegraft.errors import SiteError
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds

_ITERATIONS = 20
_OPEN = 1.0
"""Logit of a gate at the start: open."""

Gates = Float[Tensor, "batch tokens"]


@kinds.register("token-router")
class TokenRouter(Delta):
    """``g * layer(x)`` on a sublayer, ``x + g * (layer(x) - x)`` on a block, with a factor ``g`` for each token.

    Where ``g`` is zero the base does not compute: the sublayer or block runs on the other tokens alone, unless another
    change lies beneath or the graft's scale is not 1. Attention inside a block that runs on some tokens is among these.
    Gates by ``threshold`` save nothing where gradients flow, nor under ``torch.compile``.

    Attributes:
        choice: ``top-k`` takes the same share of every sample, with soft top-k factors of the normalised input's score
            (CoDA). ``threshold`` lets each token open its gate, whose gradient passes straight through (DyT); its gates
            start open, and draw noise in training. Blocks take ``top-k`` alone.
        share: of the tokens, for ``top-k``; the controller ``token-rate`` says it for ``threshold``.
        temperature: of the soft top-k, or of the gates' sigmoid.
        front: number of first tokens that always go through, such as class tokens; ``threshold`` only.
    """

    kind = "token-router"
    on = ("sublayer", "block")
    reads_weight: ClassVar[bool] = False

    choice: Literal["top-k", "threshold"] = "top-k"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    temperature: PositiveFloat = 1.0
    front: NonNegativeInt = 0

    @property
    def starts_as_identity(self) -> bool:
        return self.choice == "threshold"

    @property
    def passes_straight(self) -> bool:
        return self.choice == "threshold"

    def fits(self, site: Site) -> None:
        super().fits(site)
        if site.type == "block" and self.choice == "threshold":
            raise SiteError(
                f"a block takes equally many tokens of each sample, at {site.name!r} too: use choice: top-k"
            )

    def shapes(self, site: Site) -> Shapes:
        score: Shapes = {"score": (site.inputs,)}
        return score if self.choice == "top-k" else {**score, "offset": (1,)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        if self.choice == "threshold":
            return {"offset": torch.full((1,), _OPEN)}
        return {"score": kaiming_uniform((site.inputs,), rng)}

    def has_effect(self, p: Any, site: Site) -> bool:
        return self.choice == "top-k" or bool(p.score.any()) or float(p.offset) <= 0

    def needed(self, p: Any, x: Float[Tensor, "batch tokens width"]) -> Needed | None:
        if self.choice == "top-k":
            scores = self._scores(p, precise(x.detach()))
            return scores.topk(self._count(scores), dim=-1).indices.sort(dim=-1).values.detach()
        # Closed gates learn from what the base gives there, and a graph does not know how many are open.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return self.gates(p, x) > 0

    def _scores(self, p: Any, x: Tensor) -> Gates:
        return F.layer_norm(x, x.shape[-1:]) @ p.score.to(x.dtype)

    def _count(self, scores: Gates) -> int:
        return math.ceil(self.share * scores.shape[-1])

    def gates(self, p: Any, x: Float[Tensor, "batch tokens width"]) -> Gates:
        """The factors of all tokens."""
        x = precise(x)
        if self.choice == "top-k":
            scores = self._scores(p, x)
            return kept_soft_top_k(scores, self._count(scores), self.temperature)
        logits = x @ p.score.to(x.dtype) + p.offset.to(x.dtype)
        if p.training:
            logits = logits + torch.logit(torch.rand_like(logits).clamp(1e-6, 1 - 1e-6))
        soft = torch.sigmoid(logits / self.temperature)
        hard = (logits > 0).to(soft.dtype)
        gates = hard + soft - soft.detach()
        return torch.cat([torch.ones_like(gates[..., : self.front]), gates[..., self.front :]], dim=-1)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        y = layer(x)
        gates = self.gates(p, x)
        if getattr(p, "noted", None) is not None:
            p.noted.value = gates
        g = gates.unsqueeze(-1).to(y.dtype)
        return x + g * (y - x) if p.op.type == "block" else g * y


class Noted:
    """The gates of the last pass, for a penalty; copies begin without any."""

    def __init__(self) -> None:
        self.value: Gates | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Noted:
        return Noted()

    def take(self) -> Gates | None:
        """The gates, forgotten here."""
        value, self.value = self.value, None
        return value


def soft_top_k(scores: Gates, k: int, temperature: float) -> Gates:
    """Factors in ``[0, 1]`` that sum to ``k``: the ``g`` of greatest ``s.g + temperature * entropy(g)``."""
    if k >= scores.shape[-1]:
        return torch.ones_like(scores)
    s, b = scores / temperature, torch.zeros_like(scores)
    for _ in range(_ITERATIONS):
        a = math.log(k) - torch.logsumexp(s + b, dim=-1, keepdim=True)
        b = (-s - a).clamp(max=0)
    return (s + a + b).exp().clamp(max=1)


def kept_soft_top_k(scores: Gates, k: int, temperature: float) -> Gates:
    """The same, zero but for the ``k`` greatest."""
    if k >= scores.shape[-1]:
        return torch.ones_like(scores) + 0 * scores
    places = scores.topk(k, dim=-1).indices
    kept = torch.zeros_like(scores).scatter(-1, places, 1.0)
    return soft_top_k(scores, k, temperature) * kept
