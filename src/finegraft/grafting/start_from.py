"""Starting a graft from the file of another: prompts, adapters or anything else that was trained on another task."""

from __future__ import annotations

from pathlib import Path

import torch

from finegraft.errors import RecipeError, StoreError
from finegraft.grafting.arguments import require_graft
from finegraft.grafting.graft import Graft
from finegraft.grafting.slot import Slot
from finegraft.grafting.stack import stack_of
from finegraft.store import check, read


@torch.no_grad()
def start_from(graft: Graft, path: str | Path) -> list[str]:
    """Let the changes of a graft start where those of a saved one ended; new heads keep their own start.

    Tensors go by site and name, so the recipes may differ elsewhere. What is trained through a perceptron has no such
    start, since files hold what the perceptron gave.

    Args:
        graft: on the base, not merged.
        path: folder written by :meth:`Graft.save`.

    Returns:
        The changes that took over tensors, by their key.

    Raises:
        StoreError: the file has nothing for this graft, or tensors of other shapes; nothing is changed then.
        BaseMismatch: it was trained on another base.
        RecipeError: no graft, or one that is merged or detached.
        RecipeError: the graft is detached or merged.
    """
    require_graft(graft, "start_from")
    if graft.merged:
        raise RecipeError("the graft is merged: call unmerge() before it takes over tensors")
    require_graft(graft, "start_from")
    stack = stack_of(graft.model)
    assert stack is not None  # an attached graft is on one
    stack.require_no_route()
    if graft.merged:
        raise RecipeError(f"{graft!r} is merged, so its numbers are in the base: unmerge it first")
    tensors, manifest = read(path)
    check(manifest.fingerprint, graft.fingerprint)
    if any(entry.get("results") or entry.get("drawn") for entry in manifest.sites):
        raise StoreError(f"{path}: a graft of chosen or written weights is no start for another")
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.rpartition("/")
        saved.setdefault(key.rpartition("/")[0], {})[name] = tensor
    taken = {slot: saved[slot.site] for slot in graft.all_slots if _starts(slot) and slot.site in saved}
    fitting = {slot: found for slot, found in taken.items() if set(dict(slot.named_parameters())) <= set(found)}
    if not fitting:
        raise StoreError(f"{path}: holds no tensors for the changes of {graft!r}")
    for slot, found in fitting.items():
        for name, parameter in slot.named_parameters():
            if parameter.shape != found[name].shape:
                shapes = f"{tuple(found[name].shape)} in the file, {tuple(parameter.shape)} here"
                raise StoreError(f"{slot.key}/{name} is {shapes}: keep lengths and ranks the same")
    for slot, found in fitting.items():
        for name, parameter in slot.named_parameters():
            parameter.copy_(found[name])
    return [slot.key for slot in fitting]


def _starts(slot: Slot) -> bool:
    return bool(slot.delta.kind != "replacement")
