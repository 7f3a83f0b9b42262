"""The catalogue as data."""

from __future__ import annotations

from finegraft.recipe import Recipe
from finegraft.registry import methods as registered


def methods() -> dict[str, Recipe]:
    """Every method by name, those of other packages included.

    Example:
        >>> methods()["lora"].train.lr
        0.001
    """
    return dict(registered.items())
