"""A hyper-network's changes for one task as an ordinary graft."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finegraft.deltas.hyper import Hyper
from finegraft.errors import RecipeError
from finegraft.grafting.arguments import require_graft
from finegraft.grafting.attach import place
from finegraft.grafting.graft import Graft
from finegraft.grafting.slot import Slot
from finegraft.grafting.stack import stack_of
from finegraft.grafting.tasks import parsed
from finegraft.locate.site import Site
from finegraft.recipe import Part, Recipe


@torch.no_grad()
def materialise(graft: Graft, task: Any = None) -> Graft:
    """Generate a hyper-network's changes for one task, once and for all, as an ordinary graft in its place.

    The new graft lies on top and is in force, and follows every verb: it can be saved alone, merged, trained on. It has
    copies of all the other changes and heads too. The hyper-network's graft stays on the model, disabled.

    Args:
        graft: a graft with changes of kind ``hyper``.
        task: a name or number, as for ``graft.task``; by default the task it acts for now.

    Raises:
        RecipeError: no graft, or one without a hyper-network, a task that it does not know, one for each sample, or a
            graft that is merged, disabled, or not on its model.
    """
    require_graft(graft, "materialise")
    stack = stack_of(graft.model)
    assert stack is not None
    stack.require_no_route()
    if graft.merged or not graft.enabled:
        raise RecipeError(f"{graft!r} is merged or disabled: unmerge or enable it before materialising it")
    generating = [slot for slot in graft.all_slots if isinstance(slot.delta, Hyper)]
    if not generating:
        raise RecipeError(f"{graft!r} has no hyper-network (kind 'hyper'), so it is an ordinary graft already")
    numbers = {id(slot): slot.task if task is None else parsed(task, slot.delta.known_tasks) for slot in generating}
    made = [
        (placement.site, [_ordinary(slot, placement.site, numbers.get(id(slot))) for slot in placement.slots])
        for placement in graft.placements
    ]
    graft.enabled = False
    try:
        ordinary = place(stack, _recipe(graft.recipe), graft.seed, made)
    except BaseException:
        graft.enabled = True
        raise
    ordinary.parts, ordinary.scale, ordinary.left_out = graft.parts, graft.scale, graft.left_out
    return ordinary


def _ordinary(slot: Slot, site: Site, task: tuple[int, ...] | None) -> Slot:
    """A change with tensors of its own: generated, or copied."""
    found = {name: tensor.detach().clone() for name, tensor in slot.tensors()}
    if not isinstance(slot.delta, Hyper):
        return Slot(slot.delta, site, slot.place, found)
    hyper = slot.delta
    generated = hyper.made(slot, task)
    kept = {*hyper.of.constants(site), *hyper.of.working(site)}
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in found.items() if name in kept}
    tensors |= {name: getattr(generated, name).detach().clone() for name in hyper.of.shapes(site)}
    return Slot(hyper.of, site, slot.place, tensors)


def _recipe(recipe: Recipe) -> Recipe:
    """The recipe with each generated kind in its own right; controllers, which act in training, are left out."""
    return recipe.model_copy(update={"parts": tuple(map(_part, recipe.parts)), "control": ()})


def _part(part: Part) -> Part:
    instead = part.instead and part.instead.model_copy(update={"what": _ungenerated(part.instead.what)})
    return part.model_copy(update={"what": _ungenerated(part.what), "instead": instead})


def _ungenerated(what: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(delta.of if isinstance(delta, Hyper) else delta for delta in what)
