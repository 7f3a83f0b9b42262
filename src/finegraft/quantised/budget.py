"""Choosing a format for each matrix, so that a budget of bits is kept at the least error (LQ-LoRA)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from finegraft.errors import MissingExtra, RecipeError


def cheapest_error(errors: Sequence[Sequence[float]], bits: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The number of one choice for each matrix, such that the sum of errors is least and that of bits in the budget.

    Solved as an integer program (Guo et al. 2023, arXiv:2311.12023).

    Args:
        errors: of each matrix under each choice.
        bits: that each matrix takes under each choice.
        budget: bits for all of them.

    Raises:
        RecipeError: the cheapest choices take more.
        MissingExtra: SciPy is not installed.
    """
    least = sum(min(row) for row in bits)
    if least > budget:
        raise RecipeError(f"a budget of {budget:.0f} bits is too small: the cheapest formats take {least:.0f}")
    optimize, np = _scipy()
    cost, weight = np.array(errors).ravel(), np.array(bits).ravel()
    count, choices = len(errors), len(errors[0])
    one_each = np.kron(np.eye(count), np.ones(choices))
    found = optimize.milp(
        cost / max(cost.max(), np.finfo(float).tiny),
        constraints=[optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint(weight[None], 0, budget)],
        integrality=np.ones_like(cost),
        bounds=optimize.Bounds(0, 1),
    )
    return [int(row.argmax()) for row in found.x.reshape(count, choices)]


def _scipy() -> tuple:
    try:
        return importlib.import_module("scipy.optimize"), importlib.import_module("numpy")
    except ImportError:
        raise MissingExtra("a budget of bits is kept by SciPy's solver: pip install 'finegraft[solvers]'") from None
