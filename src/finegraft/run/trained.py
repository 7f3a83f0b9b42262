"""Loading what a run made: the base with its graft, ready to be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from finegraft.data.base import load_base
from finegraft.data.task import Task
from finegraft.errors import StoreError
from finegraft.grafting import Graft, load
from finegraft.store import read_manifest
from finegraft.train.processes import processes


@dataclass(frozen=True)
class Trained:
    """A base with a trained graft on it.

    Attributes:
        model: in evaluation mode, on ``device``.
        graft: attached to it.
        processor: the base's tokenizer or image processor.
        task: what it was trained for.
        labels: class names in the order of the logits; None without classes.
        base: the base's name.
        device: where the model is.
    """

    model: nn.Module
    graft: Graft
    processor: Any
    task: Task
    labels: list[str] | None
    base: str
    device: torch.device


def describe_task(task: Task, *, labels: list[str] | None, base: str) -> dict[str, Any]:
    """What is stored with a graft so that :func:`load_trained` needs nothing else."""
    return {"base": base, "labels": labels, "task": task.model_dump(mode="json", exclude_none=True)}


def graft_folder(path: str | Path) -> Path:
    """The graft's folder, given it or the run's."""
    folder = Path(path)
    return folder / "graft" if (folder / "graft" / "graft.json").is_file() else folder


def load_trained(path: str | Path, *, base: str | None = None) -> Trained:
    """Loads the base that a graft belongs to, and the graft onto it.

    Args:
        path: folder of a graft, or of the run that made it.
        base: the base model; by default the one that the graft names.

    Raises:
        StoreError: no graft, a damaged one, or one that names no task.
        BaseMismatch: another base than the graft was made for.
    """
    folder = graft_folder(path)
    told: dict[str, Any] = read_manifest(folder).task or {}
    try:
        task = Task.model_validate(told["task"])
    except (KeyError, ValidationError):
        raise StoreError(
            f"{folder} does not say what it was trained for, so it was not made by finegraft tune; "
            "load it with fg.load(path, model)"
        ) from None
    found = load_base(base or told["base"], task, labels=told["labels"])
    device = processes().device
    model = found.model.to(device).eval()
    return Trained(model, load(folder, model), found.processor, task, told["labels"], found.name, device)
