"""How much the loss depends on numbers that train, smoothed over steps, and how surely.

AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): with ``I`` of each step, ``mean <- b1 mean + (1 - b1) I`` and then
``spread <- b2 spread + (1 - b2) |I - mean|``; the score is ``mean * spread``.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from finegraft.control.run import Run

_MEAN, _SPREAD = "mean", "spread"


def note(run: Run, name: str, importance: Float[Tensor, ...], mean_decay: float, spread_decay: float) -> None:
    """Take up the importance of some numbers in a step."""
    mean = run.memory.get(f"{_MEAN}/{name}", importance.new_zeros(())).to(importance) * mean_decay
    mean = mean + (1 - mean_decay) * importance
    spread = run.memory.get(f"{_SPREAD}/{name}", importance.new_zeros(())).to(importance) * spread_decay
    run.memory[f"{_MEAN}/{name}"] = mean
    run.memory[f"{_SPREAD}/{name}"] = spread + (1 - spread_decay) * (importance - mean).abs()


def score(run: Run, name: str) -> Tensor | None:
    """The score of numbers by name; None before any step was taken up."""
    if f"{_MEAN}/{name}" not in run.memory:
        return None
    found: Tensor = run.memory[f"{_MEAN}/{name}"] * run.memory[f"{_SPREAD}/{name}"]
    return found


def forget(run: Run) -> None:
    """Remember nothing of it."""
    for key in [key for key in run.memory if key.partition("/")[0] in (_MEAN, _SPREAD)]:
        del run.memory[key]
