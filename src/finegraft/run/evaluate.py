"""Scoring a trained graft on labelled rows."""

from __future__ import annotations

from pathlib import Path

from finegraft.data.prepare import prepare
from finegraft.data.task import Data
from finegraft.run.trained import load_trained
from finegraft.train.evaluation import evaluate_rows


def evaluate(
    graft_path: str | Path,
    data: str | Path,
    *,
    base: str | None = None,
    batch_size: int = 64,
    precision: str = "fp32",
    limit: int | None = None,
) -> dict[str, float]:
    """The task's metrics of a graft on rows it may never have seen.

    Args:
        graft_path: folder of a graft, or of the run that made it.
        data: labelled rows: a file, an image folder, or a data set of the Hub.
        base: the base model; by default the one that the graft names.
        batch_size: rows in a forward pass.
        precision: ``fp32``, or ``bf16`` for autocast.
        limit: use at most so many rows.

    Returns:
        Metrics by name, ``loss`` (mean over rows) among them.

    Raises:
        StoreError: a graft that cannot be used.
        DataError: rows that cannot be used.
        TrainingError: memory ran out.
    """
    trained = load_trained(graft_path, base=base)
    rows = Data.model_validate({"eval": str(data), "limit": limit})
    prepared = prepare(trained.task, trained.processor, rows, labels=trained.labels)
    return evaluate_rows(
        trained.model, prepared.eval, prepared, batch_size=batch_size, device=trained.device, precision=precision
    ).metrics
