"""Which task a graft acts for, where its changes differ by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finegraft.errors import RecipeError
from finegraft.grafting.slot import Slot
from finegraft.registry import nearest

if TYPE_CHECKING:
    from finegraft.grafting.graft import Graft

Names = tuple[tuple[str, ...], ...]


def set_task(slots: Sequence[Slot], task: Any) -> None:
    """Let changes act for a task, or for one task of each sample.

    Args:
        slots: the changes of a graft.
        task: a name or number; a tuple of them where tasks are told apart by several conditions; or a list or tensor
            of these, one for each sample.

    Raises:
        RecipeError: no change differs by task, or a task that one of them does not know; nothing is changed then.
    """
    differing = [slot for slot in slots if slot.delta.known_tasks]
    if not differing:
        raise RecipeError(
            f"no change of this graft differs by task, so it has none to set to {task!r}: hyper-networks do (kind "
            "'hyper'), and kind 'low-rank-mixture' whose experts are names of tasks (experts=['depth', 'edges'])"
        )
    chosen = [parsed(task, slot.delta.known_tasks) for slot in differing]
    for slot, own in zip(differing, chosen, strict=True):
        slot.task = own


def parsed(task: Any, names: Names) -> tuple[Any, ...]:
    """A task as numbers, one for each condition; or a tuple of such, one for each sample."""
    task = task.tolist() if isinstance(task, Tensor) else task
    if _is_one(task, len(names)):
        return _numbers(task, names)
    if not isinstance(task, (list, tuple)) or not task:
        raise RecipeError(f"a task is {_form(names)}, or a list of one for each sample, not {task!r}")
    return tuple(_numbers(one, names) for one in task)


def _is_one(task: Any, conditions: int) -> bool:
    if isinstance(task, (str, int)):
        return True
    whole = isinstance(task, (list, tuple)) and len(task) == conditions > 1
    return whole and all(isinstance(one, (str, int)) for one in task)


def _numbers(task: Any, names: Names) -> tuple[int, ...]:
    given = tuple(task) if isinstance(task, (list, tuple)) else (task,)
    if len(given) != len(names):
        raise RecipeError(f"a task is {_form(names)}, not {task!r}")
    return tuple(_number(one, known) for one, known in zip(given, names, strict=True))


def _number(task: Any, known: tuple[str, ...]) -> int:
    if isinstance(task, str) and task in known:
        return known.index(task)
    if type(task) is int and 0 <= task < len(known):
        return task
    raise RecipeError(f"unknown task {task!r}; {nearest(str(task), list(known))}")


def _form(names: Names) -> str:
    known = f"one of {', '.join(names[0])}"
    return f"{known}, or its number" if len(names) == 1 else f"a tuple of {len(names)}, each {known}"


@torch.no_grad()
def nearest_tasks(graft: Graft) -> list[str]:
    """For each sample of the last batch the task whose embedding is nearest to what the retriever makes of the sample.

    Args:
        graft: one with a hyper-network that has a retriever (method ``pha``), trained.

    Raises:
        RecipeError: no retriever in the graft, or no batch has gone through it yet.

    Example:
        ``model(**batch); graft.task = fg.nearest_tasks(graft); model(**batch)``
    """
    from finegraft.grafting.arguments import require_graft  # which itself imports this, by way of grafts

    require_graft(graft, "nearest_tasks")
    slot = retrieving(graft)
    if slot is None:
        raise RecipeError(f"{graft!r} has no retriever, or no batch has gone through the model yet (retriever: true)")
    near = (
        slot.delta.retrieved(slot)
        @ torch.nn.functional.normalize(getattr(slot, f"{slot.delta.conditions[0]}_embedding"), dim=-1).T
    )
    (names,) = slot.delta.known_tasks
    return [names[number] for number in near.argmax(-1).tolist()]


def retrieving(graft: Graft) -> Any:
    """The last change of a graft that has a retriever and saw a batch; None where there is none."""
    found = [slot for slot in graft.all_slots if slot.delta.auxiliary and slot.state is not None]
    return found[-1] if found else None
