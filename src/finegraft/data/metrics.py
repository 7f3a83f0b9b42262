"""How well predictions agree with labels.

Every kind of task has two functions. ``reduce(logits, labels)`` runs on each batch, on the device, and
keeps what scoring needs and no more (for a language model two numbers a block instead of the logits of a
whole vocabulary for each token); it is what ``transformers.Trainer`` calls
``preprocess_logits_for_metrics``. ``score(predictions, labels)`` runs once, on what ``reduce`` returned for
all batches, joined by :func:`join`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # what torch's cross entropy, Transformers' models and its Trainer leave out


@dataclass(frozen=True)
class Scoring:
    """The pair of functions above, and the names of what ``score`` gives, the one that decides first."""

    reduce: Callable[[Any, Tensor], Tensor]
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    metrics: tuple[str, ...]
    higher_is_better: bool = True

    @property
    def headline(self) -> str:
        """The metric that decides."""
        return self.metrics[0]


def join(batches: Sequence[np.ndarray]) -> np.ndarray:
    """Stack the results of batches; two-dimensional ones of unlike width are padded with -100."""
    if batches[0].ndim < 2:
        return np.concatenate(batches)
    width = max(batch.shape[1] for batch in batches)
    padded = [np.pad(batch, ((0, 0), (0, width - batch.shape[1])), constant_values=IGNORED) for batch in batches]
    return np.concatenate(padded)


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur in either array of 2 tp / (2 tp + fp + fn)."""
    scores = []
    for name in np.union1d(predicted, labels):
        chosen, true = predicted == name, labels == name
        scores.append(2 * np.sum(chosen & true) / (np.sum(chosen) + np.sum(true)))
    return float(np.mean(scores))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation; 0 when either side is constant, where it is not defined."""
    x, y = x - np.mean(x), y - np.mean(y)
    size = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / size) if size > 0 else 0.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of ranks, where equal values share their mean rank; 0 when either side is constant."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def _first(logits: Any) -> Tensor:
    """Some models return more than logits; logits come first."""
    return (logits[0] if isinstance(logits, tuple) else logits).detach().float()


def _keep(logits: Any, labels: Tensor) -> Tensor:
    return _first(logits)


def _class_scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    chosen = predictions.argmax(-1)
    return {"accuracy": float(np.mean(chosen == labels)), "f1": macro_f1(chosen, labels)}


def _squeeze(logits: Any, labels: Tensor) -> Tensor:
    return _first(logits).reshape(labels.shape)


def _number_scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    x, y = predictions.astype(np.float64), labels.astype(np.float64)
    return {"spearman": spearman(x, y), "pearson": pearson(x, y), "mse": float(np.mean((x - y) ** 2))}


def _most_likely(logits: Any, labels: Tensor) -> Tensor:
    return _first(logits).argmax(-1)


def _word_scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    scored = labels != IGNORED
    chosen, true = predictions[scored], labels[scored]
    return {"f1": macro_f1(chosen, true), "accuracy": float(np.mean(chosen == true))}


def _summed_loss(logits: Any, labels: Tensor) -> Tensor:
    """(batch, time, vocabulary), (batch, time) -> (batch, 2): nats of the scored tokens, and their number."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    # row by row: a float32 copy of all logits would be the largest tensor of the evaluation
    nats = [
        torch.nn.functional.cross_entropy(row[:-1].float(), target, ignore_index=IGNORED, reduction="sum")
        for row, target in zip(logits.detach(), targets, strict=True)
    ]
    return torch.stack([torch.stack(nats), (targets != IGNORED).sum(-1).float()], dim=-1)


def _language_scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    nats, tokens = predictions.astype(np.float64).sum(0)
    loss = nats / tokens
    return {"perplexity": float(np.exp(min(loss, 700.0))), "loss": float(loss)}  # exp(710) is infinite


def _partner_found(logits: Any, labels: Tensor) -> Tensor:
    return (_first(logits).argmax(-1) == labels).float()


def _partner_scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"accuracy": float(np.mean(predictions))}


SCORINGS: dict[str, Scoring] = {
    "classification": Scoring(_keep, _class_scores, ("accuracy", "f1")),
    "image-classification": Scoring(_keep, _class_scores, ("accuracy", "f1")),
    "regression": Scoring(_squeeze, _number_scores, ("spearman", "pearson", "mse")),
    "token-classification": Scoring(_most_likely, _word_scores, ("f1", "accuracy")),
    "causal-lm": Scoring(_summed_loss, _language_scores, ("perplexity", "loss"), higher_is_better=False),
    "sentence-embedding": Scoring(_squeeze, _number_scores, ("spearman", "pearson", "mse")),
}
# pairs without a score: how often the partner is the most similar text of its batch
PARTNERS = Scoring(_partner_found, _partner_scores, ("accuracy",))
