"""From the outputs of a model to one plain answer for each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finegraft.data.metrics import IGNORED
from finegraft.run.trained import Trained

Answer = dict[str, Any]
Row = dict[str, Any]


def answers(trained: Trained, rows: list[Row], batch: dict[str, Tensor], *, max_new_tokens: int) -> list[Answer]:
    """One answer for each encoded row of a batch.

    Classes get ``label`` and ``scores`` (probability by class), numbers ``score``, words ``labels`` (one a word),
    prompts ``continuation`` (greedy), single texts ``vector``, and pairs of texts ``similarity``.

    Args:
        trained: model and task.
        rows: encoded rows.
        batch: the same rows, collated, on the model's device.
        max_new_tokens: longest continuation of a prompt.
    """
    if trained.task.kind == "causal-lm":
        return _continuations(trained, batch, max_new_tokens)
    logits = trained.model(**batch)["logits"].float().cpu()
    return _ANSWERS[trained.task.kind](trained, rows, logits)


def _continuations(trained: Trained, batch: dict[str, Tensor], max_new_tokens: int) -> list[Answer]:
    generate: Any = trained.model.generate
    made = generate(
        **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=trained.processor.pad_token_id
    )
    new = made[:, batch["input_ids"].shape[1] :]
    return [{"continuation": text} for text in trained.processor.batch_decode(new, skip_special_tokens=True)]


def _classes(trained: Trained, rows: list[Row], logits: Tensor) -> list[Answer]:
    names = trained.labels or []
    return [
        {"label": names[int(shares.argmax())], "scores": dict(zip(names, shares.tolist(), strict=True))}
        for shares in torch.softmax(logits, dim=-1)
    ]


def _numbers(trained: Trained, rows: list[Row], logits: Tensor) -> list[Answer]:
    return [{"score": value} for value in logits.reshape(len(rows)).tolist()]


def _words(trained: Trained, rows: list[Row], logits: Tensor) -> list[Answer]:
    names, found = trained.labels or [], []
    for row, classes in zip(rows, logits.argmax(-1).tolist(), strict=True):
        begins = [place for place, word in enumerate(row["words"]) if word != IGNORED]
        offset = len(classes) - len(row["words"]) if trained.processor.padding_side == "left" else 0
        found.append({"labels": [names[classes[offset + place]] for place in begins]})
    return found


def _vectors(trained: Trained, rows: list[Row], logits: Tensor) -> list[Answer]:
    name = "vector" if logits.dim() == 2 else "similarity"
    return [{name: value} for value in logits.tolist()]


_ANSWERS: dict[str, Callable[[Trained, list[Row], Tensor], list[Answer]]] = {
    "classification": _classes,
    "image-classification": _classes,
    "regression": _numbers,
    "token-classification": _words,
    "sentence-embedding": _vectors,
}
