"""Scoring: whatever the batches are, the same result, in the order of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from finegraft.data.metrics import SCORINGS
from finegraft.data.prepare import Prepared
from finegraft.errors import TrainingError
from finegraft.train.evaluation import evaluate_rows
from tests.train.tiny import BagOfTokens, collate, tiny_rows


def prepared(rows: Any) -> Prepared:
    scoring = SCORINGS["classification"]
    return Prepared(
        train=None,
        eval=rows,
        test=None,
        collate=collate,
        labels=["0", "1"],
        reduce=scoring.reduce,
        metrics=scoring.score,
        headline=scoring.headline,
        higher_is_better=True,
    )


def test_results_are_in_the_order_of_the_rows_and_do_not_hang_on_the_batch_size() -> None:
    rows, model = tiny_rows(23), BagOfTokens()
    found = [evaluate_rows(model, rows, prepared(rows), batch_size=size) for size in (1, 4, 100)]
    model.eval()
    with torch.no_grad():
        one_by_one = [model(**collate([row])) for row in rows]
    expected = torch.cat([outputs["logits"] for outputs in one_by_one]).numpy()
    for evaluation in found:
        assert np.allclose(evaluation.predictions, expected, atol=1e-6)
        assert evaluation.labels.tolist() == rows["labels"][:]
        assert evaluation.metrics["loss"] == pytest.approx(sum(float(o["loss"]) for o in one_by_one) / 23, rel=1e-5)
        assert evaluation.metrics["accuracy"] == np.mean(expected.argmax(-1) == np.array(rows["labels"][:]))


def test_scoring_leaves_modes_and_random_numbers_as_they_were() -> None:
    rows, model = tiny_rows(8), BagOfTokens().train()
    model.dropout.eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    evaluate_rows(model, rows, prepared(rows))
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in (model, model.hidden, model.dropout)] == [True, True, False]


def test_running_out_of_memory_says_what_to_lower() -> None:
    class Large(BagOfTokens):
        def forward(self, **batch: Any) -> dict[str, Any]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    rows = tiny_rows(8)
    with pytest.raises(TrainingError, match=r"train.eval_batch_size \(now 16\)"):
        evaluate_rows(Large(), rows, prepared(rows), batch_size=16)
