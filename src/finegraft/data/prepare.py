"""From tables to everything that training and evaluation need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from finegraft.data.collate import collator
from finegraft.data.encode import ENCODERS, Purpose, Reading
from finegraft.data.labels import label_names
from finegraft.data.metrics import PARTNERS, SCORINGS, Scoring
from finegraft.data.read import Tables, at_most, read_data
from finegraft.data.task import Data, Task
from finegraft.errors import DataError


@dataclass(frozen=True)
class Prepared:
    """Data ready for a model.

    Attributes:
        train: encoded rows in the order of the table; None without a source.
        eval: encoded rows in the order of the table.
        test: encoded rows in the order of the table; None without a source.
        collate: a list of encoded rows -> one padded batch, with ``labels`` where the rows have them. Under
            ``transformers.Trainer`` set ``remove_unused_columns=False``: it reads columns no model takes.
        labels: class names in the order of the logits; None for kinds without classes.
        reduce: ``(logits, labels) -> Tensor`` (batch, ...), to run on each batch: the Trainer's
            ``preprocess_logits_for_metrics``. For causal-lm it gives (batch, 2): summed nats, scored tokens.
        metrics: ``(predictions, labels) -> {name: value}`` from all results of ``reduce`` and all ``labels``,
            each joined by :func:`finegraft.data.metrics.join` (the Trainer joins in the same way).
        headline: name of the metric that decides.
        higher_is_better: whether the headline should rise.
    """

    train: datasets.Dataset | None
    eval: datasets.Dataset
    test: datasets.Dataset | None
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    labels: list[str] | None
    reduce: Callable[[Any, Tensor], Tensor]
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    headline: str
    higher_is_better: bool

    def lengths(self, dataset: datasets.Dataset) -> list[int]:
        """Tokens in each row (1 for an image): what batches are bucketed by."""
        return dataset["length"][:]


def prepare(task: Task, processor: Any, data: Data | Tables, *, labels: list[str] | None = None) -> Prepared:
    """Read, check and encode the rows of a task.

    Args:
        task: kind of task and columns.
        processor: ``Base.processor``: the tokenizer or image processor of the base.
        data: the sources, or the tables that :func:`~finegraft.data.read.read_data` made of them.
        labels: class names, in the order of the logits, such as those saved with a graft; by default those
            of the training rows (:func:`~finegraft.data.labels.label_names`).

    Raises:
        DataError: a column that is absent, a missing text or label, a label that is not in ``labels``,
            training rows of one class only, or no rows.
    """
    tables = read_data(task, data) if isinstance(data, Data) else data
    labels = label_names(task, tables) if labels is None else labels
    reading = Reading(task, processor, labels)
    train = _encode(reading, tables.train, tables.data.train, "train", tables.data.limit)
    test = _encode(reading, tables.test, tables.data.test, "score", tables.data.limit)
    evaluation = _encode(reading, tables.eval, tables.data.eval, "score", tables.data.limit)
    assert evaluation is not None
    scoring = _scoring(task, evaluation)
    if test is not None and _scoring(task, test) is not scoring:
        raise DataError(f"of {tables.data.eval} and {tables.data.test} only one has scores; both or none must")
    return Prepared(
        train=train,
        eval=evaluation,
        test=test,
        collate=collator(task, processor),
        labels=labels,
        reduce=scoring.reduce,
        metrics=scoring.score,
        headline=scoring.headline,
        higher_is_better=scoring.higher_is_better,
    )


def encode(task: Task, processor: Any, rows: datasets.Dataset, *, source: str = "the input") -> datasets.Dataset:
    """Encode rows without labels, for prediction: one encoded row for each row, in the same order."""
    return ENCODERS[task.kind](rows, source, Reading(task, processor, None), "predict")


def _encode(
    reading: Reading, rows: datasets.Dataset | None, source: str | None, purpose: Purpose, limit: int | None
) -> datasets.Dataset | None:
    if rows is None or source is None:
        return None
    # blocks exist only after encoding, and images are not read before they are used
    late = reading.task.kind in ("causal-lm", "image-classification")
    encoded = ENCODERS[reading.task.kind](rows if late else at_most(rows, limit), source, reading, purpose)
    return at_most(encoded, limit) if late else encoded


def _scoring(task: Task, evaluation: datasets.Dataset) -> Scoring:
    unscored = task.kind == "sentence-embedding" and "labels" not in evaluation.column_names
    return PARTNERS if unscored else SCORINGS[task.kind]
