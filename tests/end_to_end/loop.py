"""A training loop of the kind that users write, and what the tests here share besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

DATA = Path(__file__).parents[2] / "data"
T = TypeVar("T")


def fit(groups: list[dict[str, Any]], batches: Iterable[T], loss: Callable[[T], Tensor]) -> None:
    """One pass over the batches: AdamW, a rate that rises over a tenth of the steps and falls, clipped gradients."""
    batches = list(batches)
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=len(batches), pct_start=0.1)
    parameters = [parameter for group in groups for parameter in group["params"]]
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def shuffled(count: int, size: int, *, epochs: int, seed: int) -> list[Tensor]:
    """Indices of the batches of some epochs, each in an order of its own."""
    rng = torch.Generator().manual_seed(seed)
    return [rows for _ in range(epochs) for rows in torch.randperm(count, generator=rng).split(size)]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def untouched(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether every tensor of the snapshot still has the same bits."""
    now = model.state_dict()
    return all(torch.equal(now[name], tensor) for name, tensor in before.items())
