"""What functions on grafts are given."""

from __future__ import annotations

from typing import Any

from finegraft.errors import RecipeError
from finegraft.grafting.graft import Graft


def require_graft(given: Any, function: str) -> None:
    """Raise :class:`RecipeError` where a function that takes a graft on a model was given something else."""
    if not isinstance(given, Graft):
        raise RecipeError(f"{function} takes a graft, as fg.graft and fg.load give it, not a {type(given).__name__}")
    _ = given.model  # an error where it was detached
