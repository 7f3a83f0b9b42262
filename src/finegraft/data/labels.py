"""The names of classes: found in the training rows, kept with the graft, looked up everywhere else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import datasets

from finegraft.data.columns import need_column, values_of
from finegraft.data.read import Tables, read_table
from finegraft.data.task import Data, Task
from finegraft.errors import DataError

_MOST_CLASSES = 10_000
_WITH_CLASSES = ("classification", "token-classification", "image-classification")


def label_names(task: Task, data: Data | Tables) -> list[str] | None:
    """The classes of the training rows, in the order of their numbers.

    Names declared by the data set are taken as declared; whole numbers are sorted by value, words by
    alphabet. Call this before the model is built: its head needs the count.

    Returns:
        The names, or None for a kind of task without classes.

    Raises:
        DataError: no training table, no such column, missing or fractional labels, fewer than two classes.
    """
    if task.kind not in _WITH_CLASSES:
        return None
    source = data.train if isinstance(data, Data) else data.data.train
    if source is None:
        raise DataError("the classes are read from the training rows, but data.train is not set")
    rows = read_table(source) if isinstance(data, Data) else data.train
    assert rows is not None
    assert task.label is not None
    column = task.label
    need_column(rows, column, source)
    declared = _declared(rows, column)
    if declared is not None:
        return declared
    present = set(_flat(class_values(rows, column, source, by_word=task.kind == "token-classification")))
    if len(present) > _MOST_CLASSES:
        raise DataError(f"{source}: column {column!r} has {len(present)} distinct values; is it really a class?")
    if len(present) < 2:
        raise _one_class(source, column, present)
    return sorted(present, key=int) if all(map(_is_whole, present)) else sorted(present)


def class_values(rows: datasets.Dataset, column: str, source: str, *, by_word: bool) -> list[Any]:
    """The class names of a column: one for each row, or ``by_word`` a list of names."""
    need_column(rows, column, source)
    declared = _declared(rows, column)
    names: list[Any] = []
    for row, value in enumerate(values_of(rows, column, source), 1):
        if isinstance(value, list) != by_word:
            needed = "a list of labels, one for each word," if by_word else "one label"
            raise DataError(f"{source}: row {row} has {value!r} in column {column!r}, where {needed} is needed")
        found = [_name(item, declared, row, column, source) for item in (value if by_word else [value])]
        names.append(found if by_word else found[0])
    return names


def class_numbers(
    rows: datasets.Dataset, column: str, source: str, labels: list[str], *, by_word: bool, training: bool
) -> list[Any]:
    """The class numbers of a column, in the order of ``labels``; see :func:`class_values` for ``by_word``.

    Raises:
        DataError: a label that is not among ``labels``; ``training`` rows that are all of one class.
    """
    names = class_values(rows, column, source, by_word=by_word)
    present, number = set(_flat(names)), {name: place for place, name in enumerate(labels)}
    if unseen := sorted(present - set(labels)):
        raise DataError(
            f"{source}: column {column!r} has labels that never occur in training: "
            f"{', '.join(map(repr, unseen[:10]))}"
            f"{' ...' if len(unseen) > 10 else ''} (known: {', '.join(map(repr, labels[:20]))})"
        )
    if training and len(present) < 2:
        raise _one_class(source, column, present)
    return [[number[item] for item in name] if isinstance(name, list) else number[name] for name in names]


def _one_class(source: str, column: str, present: set[str]) -> DataError:
    only = next(iter(present), None)
    found = f"only the class {only!r}" if present else "no labels"
    return DataError(f"{source}: column {column!r} holds {found}; training needs rows of at least two classes")


def _declared(rows: datasets.Dataset, column: str) -> list[str] | None:
    """Class names that the data set itself declares for a column."""
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _flat(names: Iterable[Any]) -> Iterable[str]:
    for name in names:
        yield from name if isinstance(name, list) else [name]


def _is_whole(name: str) -> bool:
    return name.lstrip("-").isdecimal()


def _name(value: Any, declared: list[str] | None, row: int, column: str, source: str) -> str:
    if declared is not None and isinstance(value, int):
        if not 0 <= value < len(declared):
            raise DataError(
                f"{source}: row {row} has label {value} in column {column!r}, which declares the classes "
                f"0 to {len(declared) - 1}; unlabelled rows have to be removed"
            )
        return declared[value]
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(
                f"{source}: row {row} has the fractional label {value} in column {column!r}; "
                f"classes are words or whole numbers, and numbers to predict need kind: regression"
            )
        return str(int(value))
    if isinstance(value, (str, int)) and str(value).strip():
        return str(value)
    raise DataError(f"{source}: row {row} has {value!r} in column {column!r}, which is no class name")
