"""A graft of its own for every sample of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from finegraft.errors import RecipeError
from finegraft.grafting.graft import Graft
from finegraft.grafting.stack import stack_of


def _several(grafts: Any) -> tuple[Graft, ...]:
    if not isinstance(grafts, (list, tuple)):
        raise RecipeError(f"route takes a graft, a list of grafts or None for each sample, not {grafts!r}")
    return tuple(grafts)


@contextmanager
def route(model: nn.Module, grafts: Sequence[Graft | Sequence[Graft] | None]) -> Iterator[None]:
    """Within this block, sample ``i`` of every batch goes through ``grafts[i]`` (None: the base; several: all of them).

    Every kind takes part. Layers compute each group of samples through its own grafts; where a graft changes what no
    layer can tell samples apart by (bare tensors, such as stacks of experts), the whole model runs group by group. New
    heads must give outputs of one shape.

    Args:
        grafts: one entry per sample; the batch must have that many samples, along the first axis of its tensors.
            Several grafts of one sample act in the order in which they were attached.

    Raises:
        RecipeError: a graft that is not on this model, merged or disabled; a batch of another size; a route in a route.

    Example:
        ``with fg.route(model, [french, None, german]): model(**batch_of_three)``
    """
    stack = stack_of(model)
    if isinstance(grafts, Graft) or not isinstance(grafts, Sequence):
        raise RecipeError(f"route takes a list with a graft, several or None for each sample, not {grafts!r}")
    wanted = [() if g is None else (g,) if isinstance(g, Graft) else _several(g) for g in grafts]
    for graft in {g for own in wanted for g in own}:
        if stack is None or graft not in stack.grafts:
            raise RecipeError(f"{graft!r} is not on this model")
        if not graft.enabled:
            raise RecipeError(f"{graft!r} is disabled: enable it, or route its samples to None")
        if graft.merged:
            raise RecipeError(f"{graft!r} is merged, so every sample goes through it: call unmerge() first")
    if stack is None or not wanted:
        raise RecipeError("route needs one graft or None for each sample of the batch, and a model with grafts")
    with stack.routed(tuple(tuple(g for g in stack.grafts if g in own) for own in wanted)):
        yield
