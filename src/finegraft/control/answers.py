"""What a model answers to a batch, with its graft and without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finegraft.control.run import Run
from finegraft.errors import RecipeError


def answers(run: Run, batch: Any, kind: str) -> Float[Tensor, "*rows classes"]:
    """The model's logits for a batch, in float32.

    Args:
        run: the training.
        batch: a mapping for ``model(**batch)``.
        kind: the controller that asks, for messages.

    Raises:
        RecipeError: the model returns no logits.
    """
    result = run.graft.model(**batch)
    logits = result.get("logits") if hasattr(result, "get") else getattr(result, "logits", None)
    if logits is None:
        raise RecipeError(
            f"control {kind!r} compares logits with those of the base; this model returns none "
            f"(it gives {type(result).__name__})"
        )
    return logits.float()


def base_answers(run: Run, batch: Any, kind: str) -> Float[Tensor, "*rows classes"]:
    """The same in evaluation mode without the graft's changes, without gradient; a new head stays as trained so far."""
    with torch.no_grad(), _evaluating(run.graft.model), _out_of_force(run):
        return answers(run, batch, kind)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _out_of_force(run: Run) -> Iterator[None]:
    before = run.graft.scale
    run.graft.scale = 0.0  # heads are not scaled, and so stay
    try:
        yield
    finally:
        run.graft.scale = before
