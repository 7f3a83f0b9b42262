"""From a list of encoded rows to one padded batch of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finegraft.data.images import as_image
from finegraft.data.metrics import IGNORED
from finegraft.data.task import Task

Row = dict[str, Any]


def collator(task: Task, processor: Any, *, multiple: int = 1) -> Callable[[list[Row]], dict[str, Tensor]]:
    """The function that makes batches of the rows of :func:`~finegraft.data.prepare.prepare`.

    Args:
        task: kind of task.
        processor: the base's tokenizer or image processor.
        multiple: pad the time axis to a multiple of this; 1 (default) pads to the longest row of the batch.
    """
    if task.kind == "image-classification":
        return ImageCollator(processor)
    padding = Padding(processor.pad_token_id or 0, processor.padding_side == "left", multiple)
    if task.kind == "sentence-embedding":
        return PairCollator(padding)
    return BlockCollator(padding) if task.kind == "causal-lm" else TextCollator(padding)


@dataclass(frozen=True)
class Padding:
    """How sequences of unlike length become one array."""

    token: int
    left: bool = False
    multiple: int = 1

    def width(self, sequences: list[list[int]]) -> int:
        """Length of the padded sequences."""
        longest = max(map(len, sequences))
        return -(-longest // self.multiple) * self.multiple

    def __call__(self, sequences: list[list[int]], filler: int, width: int) -> Tensor:
        """(row, width) of the sequences, with ``filler`` where a row is shorter."""
        padded = np.full((len(sequences), width), filler, np.int64)
        for row, sequence in zip(padded, sequences, strict=True):
            row[width - len(sequence) if self.left else 0 :][: len(sequence)] = sequence
        return torch.from_numpy(padded)

    def tokens(self, sequences: list[list[int]], width: int) -> dict[str, Tensor]:
        """Padded ids and the mask of what is not padding."""
        ones = [[1] * len(sequence) for sequence in sequences]
        return {"input_ids": self(sequences, self.token, width), "attention_mask": self(ones, 0, width)}


@dataclass(frozen=True)
class TextCollator:
    """Batches (row, time) of texts or pairs read together; labels are (row,) or, for words, (row, time)."""

    padding: Padding

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        width = self.padding.width(ids)
        batch = self.padding.tokens(ids, width)
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self.padding([row["token_type_ids"] for row in rows], 0, width)
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            batch["labels"] = (
                self.padding(labels, IGNORED, width) if isinstance(labels[0], list) else torch.tensor(labels)
            )
        return batch


@dataclass(frozen=True)
class PairCollator:
    """Batches (row, 2, time) of pairs, or (row, time) of single texts.

    ``labels`` are the scores, or without scores each row's own number: where its partner stands.
    """

    padding: Padding

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        left = [row["input_ids"] for row in rows]
        if "input_ids_pair" not in rows[0]:
            return self.padding.tokens(left, self.padding.width(left))
        right = [row["input_ids_pair"] for row in rows]
        width = self.padding.width(left + right)
        sides = self.padding.tokens(left, width), self.padding.tokens(right, width)
        batch = {name: torch.stack([sides[0][name], sides[1][name]], dim=1) for name in sides[0]}
        scores = [row.get("labels") for row in rows]
        batch["labels"] = torch.arange(len(rows)) if scores[0] is None else torch.tensor(scores)
        return batch


@dataclass(frozen=True)
class BlockCollator:
    """Batches (row, time) of blocks; labels are the ids, with -100 where a token only serves as context."""

    padding: Padding

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        width = self.padding.width(ids)
        batch = self.padding.tokens(ids, width)
        if "context" in rows[0]:
            labels = [[IGNORED] * row["context"] + row["input_ids"][row["context"] :] for row in rows]
            batch["labels"] = self.padding(labels, IGNORED, width)
        return batch


@dataclass(frozen=True)
class ImageCollator:
    """Batches of pixels (row, channel, height, width), made by the base's image processor."""

    processor: Any

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        images = [as_image(row["image"]) for row in rows]
        batch = {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch
