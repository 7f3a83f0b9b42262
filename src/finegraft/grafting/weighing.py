"""How much each of several changes acts on each sample of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from finegraft.errors import RecipeError
from finegraft.grafting.arguments import require_graft
from finegraft.grafting.graft import Graft
from finegraft.grafting.slot import Slot
from finegraft.grafting.stack import stack_of


@contextmanager
def weigh(graft: Graft, weights: Float[Tensor, "samples experts"]) -> Iterator[None]:
    """Within this block, sample ``i`` of every batch takes the graft's mixtures with ``weights[i]``.

    Where activations are computed again in backward, backward belongs in the block too.

    Args:
        graft: a graft with changes of kind ``low-rank-mixture``.
        weights: one for each of a mixture's changes; any numbers, which may require gradients.

    Raises:
        RecipeError: no mixture in the graft, no tensor or another number of weights, a graft that is merged, or a
            route in the block or around it; on use, a batch of another size, or a kind above that reads the weight.

    Example:
        ``with fg.weigh(graft, torch.stack([1 - quality, quality], dim=1)): model(**batch)``
    """
    require_graft(graft, "weigh")
    stack = stack_of(graft.model)
    assert stack is not None  # an attached graft is on one
    stack.require_no_route()
    slots = [slot for slot in graft.all_slots if slot.delta.weighed]
    if not slots:
        raise RecipeError(f"{graft!r} weighs nothing by sample: kind 'low-rank-mixture' does")
    if graft.merged:
        raise RecipeError(f"{graft!r} is merged, with the same weights for every sample: call unmerge() first")
    for slot in slots:
        _require_weights(weights, slot)
    before = [slot.sample_weights for slot in slots]
    for slot in slots:
        slot.sample_weights = weights
    try:
        yield
    finally:
        for slot, own in zip(slots, before, strict=True):
            slot.sample_weights = own


def _require_weights(weights: Any, slot: Slot) -> None:
    if not isinstance(weights, Tensor):
        found = f"a {type(weights).__name__}"
    elif weights.ndim != 2 or not len(weights) or weights.shape[1] != slot.delta.weighed:
        found = f"{weights.dtype} {tuple(weights.shape)}"
    elif not weights.is_floating_point():
        found = str(weights.dtype)
    else:
        return
    raise RecipeError(
        f"weights are a floating-point tensor (samples, {slot.delta.weighed}) for {slot.site!r}, not {found}"
    )
