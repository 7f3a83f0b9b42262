"""Merging for good: a plain model that no longer knows of grafts."""

from __future__ import annotations

from torch import nn

from finegraft.errors import RecipeError
from finegraft.grafting.graft import Graft
from finegraft.grafting.stack import stack_of


def merge(model: nn.Module, *grafts: Graft) -> nn.Module:
    """Write grafts into the base's tensors for good and take them off; the model is returned.

    Args:
        model: the base with the grafts on it.
        grafts: which; all by default. Disabled ones are taken off then.

    Raises:
        NotMergeable: a change that no weight can express; nothing is changed then.
        RecipeError: no graft is on the model, or one that is meant is not, or is disabled.
    """
    stack = stack_of(model)
    if stack is None:
        raise RecipeError("no graft is on this model; attach one with fg.load(path, model)")
    strangers = [graft for graft in grafts if graft not in stack.grafts]
    if strangers:
        raise RecipeError(f"{strangers[0]!r} is no graft on this model; it has {stack.grafts}")
    chosen = [graft for graft in stack.grafts if (graft in grafts if grafts else graft.enabled)]
    merged: list[Graft] = []
    try:
        for graft in chosen:
            if not graft.merged:
                graft.merge()
                merged.append(graft)
    except BaseException:
        for graft in reversed(merged):
            graft.unmerge()
        raise
    idle = [] if grafts else [graft for graft in stack.grafts if not graft.enabled]
    if chosen:
        stack.make_permanent(chosen)
    for graft in idle:
        graft.detach()
    return model


def grafts(model: nn.Module) -> list[Graft]:
    """The grafts on a model, in the order in which they act; on a copied model, the copies."""
    stack = stack_of(model)
    return [] if stack is None else list(stack.grafts)
