"""Rows of a table as model inputs, one function for each kind of task.

Every function takes the rows, the name of their source for errors, and a :class:`Reading`, and gives a
``datasets.Dataset`` in memory whose column ``length`` counts tokens. Attention masks are not stored: the
collator knows what it padded. ``purpose`` is ``train``, ``score`` (labels needed) or ``predict`` (labels
not read).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from finegraft.data.columns import need_column, numbers_of, texts_of, values_of
from finegraft.data.labels import class_numbers
from finegraft.data.metrics import IGNORED
from finegraft.data.task import Task
from finegraft.errors import DataError

Purpose = Literal["train", "score", "predict"]

_IDS = pa.list_(pa.int32())
_CHUNK = 1000  # texts tokenised at once: enough for all threads of a fast tokenizer, little memory


@dataclass(frozen=True)
class Reading:
    """What turns rows into inputs: the task, the tokenizer or image processor, and the class names."""

    task: Task
    processor: Any
    labels: list[str] | None

    @property
    def max_length(self) -> int:
        """Tokens in one input; the task's setting, or the tokenizer's limit or 512, whichever is smaller."""
        limit = self.processor.model_max_length
        asked = self.task.max_length
        if asked is not None and asked > limit:
            raise DataError(f"max_length {asked} is more than the {limit} tokens that the base model can read")
        return asked or min(limit, 512)


def _batches(reading: Reading, *columns: list[str], **options: Any) -> Iterator[Any]:
    """What the tokenizer makes of the columns, some rows at a time, truncated to the input allowed."""
    settings = {"truncation": True, "max_length": reading.max_length, "verbose": False} | options
    for start in range(0, len(columns[0]), _CHUNK):
        yield reading.processor(*(column[start : start + _CHUNK] for column in columns), **settings)


def _tokens(reading: Reading, *columns: list[str], **options: Any) -> dict[str, pa.ChunkedArray]:
    """Token ids of all rows, and token types where two texts are read together."""
    ids, types = [], []
    for batch in _batches(reading, *columns, return_attention_mask=False, **options):
        ids.append(pa.array(batch["input_ids"], _IDS))
        if len(columns) > 1 and "token_type_ids" in batch:
            types.append(pa.array(batch["token_type_ids"], pa.list_(pa.int8())))
    found = {"input_ids": pa.chunked_array(ids)}
    return found | ({"token_type_ids": pa.chunked_array(types)} if types else {})


def _table(inputs: dict[str, Any], **more: Any) -> datasets.Dataset:
    columns = inputs | {name: value if _is_arrow(value) else pa.array(value) for name, value in more.items()}
    if "length" not in columns:
        columns["length"] = pa.compute.list_value_length(columns["input_ids"])
    return datasets.Dataset(pa.table(columns))


def _is_arrow(value: Any) -> bool:
    return isinstance(value, (pa.Array, pa.ChunkedArray))


def _texts(rows: datasets.Dataset, source: str, reading: Reading) -> dict[str, pa.ChunkedArray]:
    names = [name for name in (reading.task.text, reading.task.text_pair) if name is not None]
    return _tokens(reading, *(texts_of(rows, name, source) for name in names))


def _classification(rows: datasets.Dataset, source: str, reading: Reading, purpose: Purpose) -> datasets.Dataset:
    inputs = _texts(rows, source, reading)
    if purpose == "predict":
        return _table(inputs)
    return _table(inputs, labels=_classes(rows, source, reading, purpose))


def _classes(rows: datasets.Dataset, source: str, reading: Reading, purpose: Purpose) -> list[Any]:
    assert reading.task.label is not None
    assert reading.labels is not None
    by_word, training = reading.task.kind == "token-classification", purpose == "train"
    return class_numbers(rows, reading.task.label, source, reading.labels, by_word=by_word, training=training)


def _regression(rows: datasets.Dataset, source: str, reading: Reading, purpose: Purpose) -> datasets.Dataset:
    inputs = _texts(rows, source, reading)
    if purpose == "predict":
        return _table(inputs)
    assert reading.task.label is not None
    numbers = numbers_of(rows, reading.task.label, source)
    if purpose == "train" and min(numbers) == max(numbers):
        raise DataError(f"{source}: column {reading.task.label!r} is {numbers[0]} in every row; nothing can be learnt")
    return _table(inputs, labels=np.asarray(numbers, np.float32))


def _token_classification(rows: datasets.Dataset, source: str, reading: Reading, purpose: Purpose) -> datasets.Dataset:
    assert reading.task.tokens is not None
    words = values_of(rows, reading.task.tokens, source)
    for row, value in enumerate(words, 1):
        if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
            raise DataError(f"{source}: row {row} of column {reading.task.tokens!r} is not a list of words")
    classes = None if purpose == "predict" else _classes(rows, source, reading, purpose)
    ids, first = [], []
    for batch in _batches(reading, words, is_split_into_words=True):
        ids.append(pa.array(batch["input_ids"], _IDS))
        first += [_first_tokens(batch.word_ids(row)) for row in range(len(batch["input_ids"]))]
    inputs = {"input_ids": pa.chunked_array(ids)}
    if classes is None:
        return _table(inputs, words=first)
    for row, (word, name) in enumerate(zip(words, classes, strict=True), 1):
        if not isinstance(name, list) or len(name) != len(word):
            raise DataError(f"{source}: row {row} needs one label for each of its {len(word)} words")
    labels = [
        [IGNORED if number == IGNORED else name[number] for number in numbers]
        for numbers, name in zip(first, classes, strict=True)
    ]
    return _table(inputs, labels=labels)


def _first_tokens(words: list[int | None]) -> list[int]:
    """For each token the number of the word that it begins, or -100."""
    before = [None, *words[:-1]]
    return [IGNORED if word is None or word == last else word for last, word in zip(before, words, strict=True)]


def _sentence_embedding(rows: datasets.Dataset, source: str, reading: Reading, purpose: Purpose) -> datasets.Dataset:
    task = reading.task
    assert task.text is not None
    assert task.text_pair is not None
    assert task.score is not None
    inputs = _tokens(reading, texts_of(rows, task.text, source))
    if purpose == "predict" and task.text_pair not in rows.column_names:
        return _table(inputs)
    right = _tokens(reading, texts_of(rows, task.text_pair, source))["input_ids"]
    counts = [pa.compute.list_value_length(side) for side in (inputs["input_ids"], right)]
    more: dict[str, Any] = {"input_ids_pair": right, "length": pa.compute.max_element_wise(*counts)}
    if purpose != "predict" and task.score in rows.column_names:
        scores = np.asarray(numbers_of(rows, task.score, source), np.float32) / task.score_scale
        if (largest := np.abs(scores).max()) > 1:
            raise DataError(
                f"{source}: column {task.score!r} reaches {largest * task.score_scale:g}, "
                f"but a cosine lies in [-1, 1]; set task.score_scale to the score of equal texts"
            )
        more["labels"] = scores
    return _table(inputs, **more)


def _causal_lm(rows: datasets.Dataset, source: str, reading: Reading, purpose: Purpose) -> datasets.Dataset:
    assert reading.task.text is not None
    texts = texts_of(rows, reading.task.text, source, blank=True)
    if purpose == "predict":
        return _table(_tokens(reading, texts, truncation=False, max_length=None))
    block, limit = reading.task.block, reading.processor.model_max_length
    if block > limit:
        raise DataError(f"max_length {block} is more than the {limit} tokens that the base model can read")
    stream = _stream(reading, [text for text in texts if text.strip()])
    if len(stream) < 2:
        raise DataError(
            f"{source}: column {reading.task.text!r} holds {len(stream)} tokens in all; at least 2 are needed"
        )
    overlap = block - (reading.task.stride or block) if purpose == "score" else 0
    starts = range(0, max(len(stream) - max(overlap, 1), 1), block - overlap)
    if purpose == "train" and len(stream) >= block:
        starts = range(0, len(stream) - block + 1, block)  # a short last block would only slow a batch down
    blocks = [stream[start : start + block] for start in starts]
    return _table({"input_ids": pa.array(blocks, _IDS)}, context=[overlap * (start > 0) for start in starts])


def _stream(reading: Reading, texts: list[str]) -> np.ndarray:
    """All texts as one run of tokens, set apart by the tokenizer's own marks or else by its end of text."""
    tokenizer = reading.processor
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    parts = [np.empty(0, np.int32)]
    for batch in _batches(reading, texts, truncation=False, max_length=None, return_attention_mask=False):
        marked = any(ids and (ids[0] in marks or ids[-1] in marks) for ids in batch["input_ids"])
        end = [] if marked or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        parts += [np.asarray(ids + end, np.int32) for ids in batch["input_ids"]]
    return np.concatenate(parts)


def _image_classification(rows: datasets.Dataset, source: str, reading: Reading, purpose: Purpose) -> datasets.Dataset:
    """Images stay as they are: pixels are made batch by batch, since all at once would not fit in memory."""
    assert reading.task.image is not None
    need_column(rows, reading.task.image, source)
    absent = rows.with_format("arrow")[reading.task.image][:]
    for row, missing in enumerate(pa.compute.is_null(absent).to_pylist(), 1):
        if missing:
            raise DataError(f"{source}: row {row} has no image in column {reading.task.image!r}")
    labels = None if purpose == "predict" else _classes(rows, source, reading, purpose)
    images = rows.select_columns([reading.task.image])
    if reading.task.image != "image":
        images = images.rename_column(reading.task.image, "image")
    images = images.add_column("length", [1] * len(rows))
    return images if labels is None else images.add_column("labels", labels)


ENCODERS: dict[str, Callable[[datasets.Dataset, str, Reading, Purpose], datasets.Dataset]] = {
    "classification": _classification,
    "regression": _regression,
    "token-classification": _token_classification,
    "causal-lm": _causal_lm,
    "image-classification": _image_classification,
    "sentence-embedding": _sentence_embedding,
}
