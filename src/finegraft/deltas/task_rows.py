"""Changes that differ by task, on a batch whose samples are of several tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finegraft.errors import RecipeError

Task = tuple[int, ...]


def differs_by_sample(task: Any) -> bool:
    """Whether it is a task for each sample, rather than one for the batch."""
    return bool(task) and isinstance(task[0], tuple)


def by_task(changed: Callable[[Task, Any, Tensor], Tensor], tasks: tuple[Task, ...], layer: Any, x: Tensor) -> Tensor:
    """``changed(task, layer, x)`` on the rows of each task, put together in the order of the batch.

    Args:
        changed: the changed layer for one task.
        tasks: the task of each sample.
        layer: the layer beneath.
        x: its input; the first axis counts samples, or tokens in the order of samples where there are two axes.

    Raises:
        RecipeError: the batch has another number of samples.
    """
    samples = len(tasks)
    flat = x.ndim == 2 and x.is_floating_point() and x.shape[0] % samples == 0
    if x.shape[0] != samples and not flat:
        raise RecipeError(
            f"graft.task says the tasks of {samples} samples; a layer was given a batch of shape {tuple(x.shape)}"
        )
    each = torch.arange(x.shape[0], device=x.device).view(samples, -1)
    whole, out = layer(x), None
    for task in dict.fromkeys(tasks):
        rows = each[[row for row, own in enumerate(tasks) if own == task]].flatten()
        own = x.index_select(0, rows)
        part = changed(task, _Rows(layer, own, whole.index_select(0, rows)), own)
        out = part.new_zeros(x.shape[0], *part.shape[1:]) if out is None else out
        out = out.index_copy(0, rows, part)
    assert out is not None
    return out


class _Rows:
    """A layer whose output for some rows of the batch is there already."""

    def __init__(self, layer: Any, x: Tensor, y: Tensor) -> None:
        self._layer, self._x, self._y = layer, x, y

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, x: Tensor) -> Tensor:
        return self._y if x is self._x else self._layer(x)
