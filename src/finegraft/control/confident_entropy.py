"""Adapting to data without labels: the entropy of predictions that are sure enough."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from jaxtyping import Float
from pydantic import Field, PositiveFloat
from torch import Tensor

from finegraft.control.controller import Controller
from finegraft.control.run import Run
from finegraft.control.two_passes import predictions
from finegraft.errors import RecipeError
from finegraft.registry import controllers


@controllers.register("confident-entropy")
class ConfidentEntropy(Controller):
    """Adds ``strength`` times the mean entropy of those predictions that are below ``threshold * ln(classes)``.

    It looks at no labels, so a loop at test time (EcoTTA, Song et al. 2023, arXiv:2303.01904) needs no loss beside it:
    call ``before_step``, ``after_backward(batch)``, ``before_update``, the optimizer, ``after_step``. Each batch takes
    a pass of its own.

    Attributes:
        strength: its coefficient.
        threshold: share of the largest possible entropy above which a sample teaches nothing.
    """

    kind = "confident-entropy"

    strength: PositiveFloat = 1.0
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.4

    def after_backward(self, run: Run, batch: Any) -> None:
        if not isinstance(batch, Mapping):
            raise RecipeError(f"control {self.kind!r} runs model(**batch); a batch here is a {type(batch).__name__}")
        own = {name: value for name, value in batch.items() if name != "labels"}
        loss = confident_entropy(predictions(run.graft.model(**own)), self.threshold)
        if loss.requires_grad:
            (self.strength * loss).backward()


def confident_entropy(logits: Float[Tensor, "n classes"], threshold: float) -> Float[Tensor, ""]:
    """Mean entropy, in nats, of the predictions whose entropy is below ``threshold * ln(classes)``; 0 where none is."""
    log_p = logits.float().log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    sure = (entropy < threshold * math.log(logits.shape[-1])).to(entropy)
    return (entropy * sure).sum() / sure.sum().clamp(min=1)
