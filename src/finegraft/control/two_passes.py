"""A penalty on how far two passes of a stochastic model differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from finegraft.control.controller import Controller
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.registry import controllers


@controllers.register("two-passes")
class TwoPasses(Controller):
    """``strength / 2 * (KL(p || q) + KL(q || p))`` between the predictions of two passes of each batch.

    Either divergence pulls its first side only (MoSA, Zhang et al. 2023, arXiv:2312.02923). The passes are two more
    than a step without it makes.

    Attributes:
        strength: its coefficient.
    """

    kind = "two-passes"

    strength: PositiveFloat = 1.0

    def after_backward(self, run: Run, batch: Any) -> None:
        if not isinstance(batch, Mapping):
            raise RecipeError(f"control {self.kind!r} runs model(**batch); a batch here is a {type(batch).__name__}")
        first, second = (predictions(run.graft.model(**batch)) for _ in range(2))
        (self.strength * symmetric_divergence(first, second)).backward()


def predictions(result: Any) -> Float[Tensor, "*tokens classes"]:
    """Logits of what a model returned, flat.

    Raises:
        RecipeError: there are none.
    """
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    logits = result.get("logits") if logits is None and isinstance(result, Mapping) else logits
    if not isinstance(logits, Tensor):
        raise RecipeError(f"predictions are compared by their logits; a {type(result).__name__} has none")
    return logits.flatten(0, -2)


def symmetric_divergence(first: Float[Tensor, "n classes"], second: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    """``(KL(p || q) + KL(q || p)) / 2``, the second side of each without gradient."""
    p, q = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
    forth = F.kl_div(q.detach(), p, log_target=True, reduction="batchmean")
    return (forth + F.kl_div(p.detach(), q, log_target=True, reduction="batchmean")) / 2
