"""Scoring a model on prepared rows, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from finegraft.data.batches import LengthBucketedSampler
from finegraft.data.metrics import join
from finegraft.data.prepare import Prepared
from finegraft.errors import TrainingError
from finegraft.train.memory import is_out_of_memory
from finegraft.train.precision import autocast


@dataclass(frozen=True)
class Evaluation:
    """How a model did.

    Attributes:
        metrics: the task's metrics, and ``loss``: the mean over rows.
        predictions: what the task keeps of the outputs, (row, ...), in the order of the rows.
        labels: (row, ...), in the order of the rows.
    """

    metrics: dict[str, float]
    predictions: np.ndarray
    labels: np.ndarray


def evaluate_rows(
    model: nn.Module,
    rows: Dataset,
    prepared: Prepared,
    *,
    batch_size: int = 64,
    device: torch.device | None = None,
    precision: str = "fp32",
) -> Evaluation:
    """Runs the model over rows, longest first, and scores it.

    The model's training mode, and the random numbers that come next, are as before afterwards.

    Args:
        model: on ``device``.
        rows: encoded rows with labels, such as ``prepared.eval``.
        prepared: says how to collate and score them.
        batch_size: rows in a forward pass; default 64.
        device: default that of the model's first parameter.
        precision: ``fp32`` or ``bf16`` (autocast).

    Raises:
        TrainingError: memory ran out.
    """
    device = device or next(model.parameters()).device
    lengths = prepared.lengths(rows)
    predictions: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    loss = 0.0
    try:
        with inferring(model, precision, device):
            for batch in batches_of(rows, prepared.collate, lengths, batch_size=batch_size, device=device):
                outputs = model(**batch)
                kept = prepared.reduce(outputs["logits"], batch["labels"])
                predictions.append(kept.float().cpu().numpy())
                labels.append(batch["labels"].cpu().numpy())
                loss += float(outputs["loss"]) * len(labels[-1])
    except Exception as error:
        if is_out_of_memory(error):
            raise TrainingError(
                f"out of memory while evaluating: lower train.eval_batch_size (now {batch_size}) or task.max_length"
            ) from error
        raise
    place = np.argsort(list(LengthBucketedSampler(lengths, batch_size, shuffle=False)))
    in_order, true = join(predictions)[place], join(labels)[place]
    metrics = {"loss": loss / len(place), **prepared.metrics(in_order, true)}
    return Evaluation(metrics, in_order, true)


def batches_of(
    rows: Dataset,
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    lengths: Sequence[int],
    *,
    batch_size: int,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """Batches on ``device`` in order of falling length; draws no global random numbers."""
    order = LengthBucketedSampler(lengths, batch_size, shuffle=False)
    loader = DataLoader(rows, batch_size=batch_size, sampler=order, collate_fn=collate, generator=torch.Generator())
    return (to_device(batch, device) for batch in loader)


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same batch on another device."""
    return {name: value.to(device) for name, value in batch.items()}


@contextmanager
def inferring(model: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, and the given precision; the mode of every module is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(), autocast(precision, device):
            yield
    finally:
        for module, training in modes:
            module.training = training
