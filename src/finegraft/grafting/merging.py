"""Merging for good: a plain model that no longer knows of grafts."""

from __future__ import annotations

from torch import nn

from finegraft.errors import RecipeError
from finegraft.grafting.graft import Graft
from finegraft.grafting.stack import stack_of


def merge(model: nn.Module, *grafts: Graft) -> nn.Module:
    """Write grafts into the base's tensors for good and take them off; the model is returned.

    Args:
        model: the base with the grafts on it; without ``grafts``, all of its grafts are meant.

    Raises:
        NotMergeable: a change that no weight can express; nothing is changed then.
        RecipeError: no graft is on the model.
    """
    stack = stack_of(model)
    if stack is None:
        raise RecipeError("no graft is on this model; attach one with fg.load(path, model)")
    chosen = [graft for graft in stack.grafts if not grafts or graft in grafts]
    merged: list[Graft] = []
    try:
        for graft in chosen:
            graft.merge()
            merged.append(graft)
    except BaseException:
        for graft in reversed(merged):
            graft.unmerge()
        raise
    stack.make_permanent(chosen)
    return model


def grafts(model: nn.Module) -> list[Graft]:
    """The grafts on a model, in the order in which they act; on a copied model, the copies."""
    stack = stack_of(model)
    return [] if stack is None else list(stack.grafts)
