"""Which parts of a recipe are meant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finegraft.errors import RecipeError


def chosen_parts(given: Any, known: Iterable[int]) -> frozenset[int]:
    """Numbers of parts, each of them known.

    Raises:
        RecipeError: no list of numbers, or one of a part that there is not.
    """
    there = sorted(known)
    if not isinstance(given, Iterable):
        raise RecipeError(f"parts are a list of their numbers, such as {there}, not {given!r}")
    wanted = list(given)
    for part in wanted:
        if type(part) is not int or part not in there:
            raise RecipeError(f"the graft has no part {part!r}; its parts are {there}")
    return frozenset(wanted)
