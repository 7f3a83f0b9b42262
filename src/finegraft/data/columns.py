"""Reading one column of a table, with an error that says which row is wrong."""

from __future__ import annotations

import math
from typing import Any

import datasets

from finegraft.errors import DataError
from finegraft.registry import nearest


def need_column(rows: datasets.Dataset, name: str, source: str) -> None:
    """Raise :class:`DataError`, listing the columns that exist, unless ``rows`` has this one."""
    if name not in rows.column_names:
        raise DataError(f"{source} has no column {name!r}; {nearest(name, rows.column_names)}")


def values_of(rows: datasets.Dataset, name: str, source: str) -> list[Any]:
    """All values of a column, none of them missing."""
    need_column(rows, name, source)
    values = rows.with_format(None)[name][:]
    for row, value in enumerate(values, 1):
        if is_missing(value):
            raise DataError(f"{source}: row {row} has no value in column {name!r}; fill it in or remove the row")
    return values


def texts_of(rows: datasets.Dataset, name: str, source: str, *, blank: bool = False) -> list[str]:
    """All texts of a column; a blank one is an error unless ``blank``."""
    texts = []
    for row, value in enumerate(values_of(rows, name, source), 1):
        if isinstance(value, (list, dict, bytes)):
            raise DataError(f"{source}: column {name!r} holds {type(value).__name__} values (row {row}), not texts")
        text = str(value)
        if not blank and not text.strip():
            raise DataError(f"{source}: row {row} has a blank text in column {name!r}; fill it in or remove the row")
        texts.append(text)
    return texts


def numbers_of(rows: datasets.Dataset, name: str, source: str) -> list[float]:
    """All numbers of a column, each finite."""
    numbers = []
    for row, value in enumerate(values_of(rows, name, source), 1):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"{source}: row {row} has {value!r} in column {name!r}, where a finite number is needed")
        numbers.append(number)
    return numbers


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null or not a number."""
    return value is None or (isinstance(value, float) and math.isnan(value))
