"""Answers of a trained graft for texts, images or pairs, line by line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import datasets

from finegraft.data.batches import LengthBucketedSampler
from finegraft.data.collate import collator
from finegraft.data.prepare import encode
from finegraft.data.task import Task
from finegraft.errors import DataError, TrainingError
from finegraft.run.answers import Answer, Row, answers
from finegraft.run.trained import Trained, load_trained
from finegraft.train.evaluation import inferring, to_device
from finegraft.train.memory import is_out_of_memory

_BATCHES_READ_AHEAD = 8


def predict(
    graft_path: str | Path,
    lines: Iterable[str],
    *,
    jsonl: bool = False,
    base: str | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 50,
) -> Iterator[Answer]:
    """One answer for each line, in their order, without waiting for the last line.

    A line is a text; two texts, where the task reads pairs, are set apart by a tab; words to be labelled by
    spaces; an image is a path. With ``jsonl`` a line is an object with the columns of the task. A line that
    cannot be answered gives ``{"line": number, "error": reason}`` in its place.

    Args:
        graft_path: folder of a graft, or of the run that made it.
        lines: the input, with or without line breaks at the end of each.
        jsonl: whether lines are JSON objects.
        base: the base model; by default the one that the graft names.
        batch_size: rows in a forward pass.
        max_new_tokens: longest continuation of a prompt.

    Yields:
        ``{"line": number, ...}``, the number counting from 1, with what :func:`finegraft.run.answers.answers` gives.

    Raises:
        StoreError: a graft that cannot be used.
        TrainingError: memory ran out.
    """
    trained = load_trained(graft_path, base=base)
    if trained.task.kind == "causal-lm":
        trained.processor.padding_side = "left"
    numbered = enumerate(lines, 1)
    while chunk := list(islice(numbered, batch_size * _BATCHES_READ_AHEAD)):
        try:
            found = _chunk(trained, chunk, jsonl, batch_size, max_new_tokens)
        except Exception as error:
            if is_out_of_memory(error):
                raise TrainingError(f"out of memory while predicting: lower --batch-size (now {batch_size})") from error
            raise
        yield from found


def _chunk(
    trained: Trained, lines: list[tuple[int, str]], jsonl: bool, batch_size: int, max_new_tokens: int
) -> list[Answer]:
    found: dict[int, Answer] = {}
    alike: dict[tuple[str, ...], dict[int, Row]] = {}
    for number, line in lines:
        try:
            row = _row(trained.task, line.rstrip("\r\n"), jsonl)
            alike.setdefault(tuple(row), {})[number] = row
        except DataError as error:
            found[number] = {"error": str(error)}
    for rows in alike.values():
        try:
            found |= _answered(trained, rows, batch_size, max_new_tokens)
        except DataError:
            found |= _one_by_one(trained, rows, max_new_tokens)
    return [{"line": number, **found[number]} for number, _ in lines]


def _one_by_one(trained: Trained, rows: dict[int, Row], max_new_tokens: int) -> dict[int, Answer]:
    found: dict[int, Answer] = {}
    for number, row in rows.items():
        try:
            found |= _answered(trained, {number: row}, 1, max_new_tokens)
        except DataError as error:
            found[number] = {"error": str(error)}
    return found


def _answered(trained: Trained, rows: dict[int, Row], batch_size: int, max_new_tokens: int) -> dict[int, Answer]:
    """Answers by line number; the rows have the same columns."""
    encoded = encode(
        trained.task, trained.processor, datasets.Dataset.from_list(list(rows.values())), source="the input"
    )
    collate = collator(trained.task, trained.processor)
    numbers = list(rows)
    found: dict[int, Answer] = {}
    order = list(LengthBucketedSampler(encoded["length"][:], batch_size, shuffle=False))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        part = [encoded[index] for index in chosen]
        with inferring(trained.model, "fp32", trained.device):
            batch = to_device(collate(part), trained.device)
            batch.pop("labels", None)  # pairs are given their row numbers as labels, to find partners by
            made = answers(trained, part, batch, max_new_tokens=max_new_tokens)
        found |= zip((numbers[index] for index in chosen), made, strict=True)
    return found


def _row(task: Task, line: str, jsonl: bool) -> Row:
    if not line.strip():
        raise DataError("the line is blank")
    if any("\udc80" <= character <= "\udcff" for character in line):
        raise DataError("the line is not UTF-8")
    columns = _columns(task)
    if jsonl:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"not JSON: {error}") from None
        missing = [column for column in columns if not isinstance(row, dict) or column not in row]
        if missing and not (task.kind == "sentence-embedding" and missing == [task.text_pair]):
            raise DataError(f"no {' and no '.join(map(repr, missing))} in the object")
        return {column: row[column] for column in columns if column in row}
    if task.kind == "token-classification":
        return {columns[0]: line.split()}
    cells = line.split("\t") if len(columns) > 1 else [line]
    if len(cells) != len(columns) and not (task.kind == "sentence-embedding" and len(cells) == 1):
        raise DataError(f"{len(cells)} of {len(columns)} texts; set them apart by a tab")
    return dict(zip(columns, cells, strict=False))


def _columns(task: Task) -> list[str]:
    """The columns that a prediction reads."""
    by_kind = {"token-classification": [task.tokens], "image-classification": [task.image]}
    return [column for column in by_kind.get(task.kind, [task.text, task.text_pair]) if column is not None]
