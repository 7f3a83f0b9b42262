"""The smallest whole number that is good enough, found with few trials."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from finegraft.errors import RecipeError


@dataclass(frozen=True)
class Smallest:
    """What :func:`smallest_enough` found.

    Attributes:
        number: the smallest that was tried and is enough; None if even the largest is not.
        below: the largest below it that was tried and is not enough; 0 if none was.
        tried: every number tried, in order, and whether it is enough.
    """

    number: int | None
    below: int
    tried: tuple[tuple[int, bool], ...]


def smallest_enough(
    enough: Callable[[int], bool], *, start: int, factor: float, most: int, resolution: float
) -> Smallest:
    """Goes up (or from a start that is enough, down) by a factor, then halves the gap geometrically.

    Where ``enough`` is not monotone, as scores of trainings are not quite, the result is a number that is enough with
    one close below that is not.

    Args:
        enough: asked about numbers from 1 to ``most``.
        start: the first number to try.
        factor: from one number of the grid to the next; above 1.
        most: the largest number to try.
        resolution: how close the two numbers may come to each other as a ratio; above 1.

    Raises:
        RecipeError: a setting out of range.

    Example:
        >>> smallest_enough(lambda n: n >= 50, start=8, factor=4, most=1000, resolution=1.01).number
        50
    """
    check_grid(start=start, factor=factor, most=most, resolution=resolution)
    tried: list[tuple[int, bool]] = []

    def reaches(number: int) -> bool:
        tried.append((number, enough(number)))
        return tried[-1][1]

    low, high = _bracket(reaches, start, factor, most)
    if high is None:
        return Smallest(None, low, tuple(tried))
    while high - low > 1 and high / max(low, 1) > resolution:
        middle = min(max(round(math.sqrt(max(low, 1) * high)), low + 1), high - 1)
        if reaches(middle):
            high = middle
        else:
            low = middle
    return Smallest(high, low, tuple(tried))


def check_grid(*, start: int, factor: float, most: int | None, resolution: float) -> None:
    """Raise :class:`RecipeError` where settings of :func:`smallest_enough` are out of range."""
    if not (1 <= start <= (start if most is None else most)):
        raise RecipeError(f"start ({start}) has to lie between 1 and the largest number ({most})")
    if not (1 < factor < math.inf and 1 < resolution < math.inf):
        raise RecipeError(f"factor ({factor}) and resolution ({resolution}) are numbers above 1")


def _bracket(reaches: Callable[[int], bool], start: int, factor: float, most: int) -> tuple[int, int | None]:
    """A number that is not enough, and one above that is (None: none is)."""
    number = start
    if reaches(number):
        while number > 1:
            smaller = max(1, min(number - 1, round(number / factor)))
            if not reaches(smaller):
                return smaller, number
            number = smaller
        return 0, 1
    while number < most:
        larger = min(most, max(number + 1, round(number * factor)))
        if reaches(larger):
            return number, larger
        number = larger
    return most, None
