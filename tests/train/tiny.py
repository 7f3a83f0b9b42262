"""A model and rows small enough to train in a blink."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn

VOCABULARY = 30


class BagOfTokens(nn.Module):
    """Mean of embeddings, one hidden layer with dropout, a head of two classes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.hidden = nn.Linear(8, 8)
            self.dropout = nn.Dropout(0.2)
            self.classifier = nn.Linear(8, 2)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        present = (input_ids > 0).unsqueeze(-1)
        mean = (self.embed(input_ids) * present).sum(1) / present.sum(1)
        logits = self.classifier(self.dropout(torch.tanh(self.hidden(mean))))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def tiny_rows(count: int = 22, seed: int = 0) -> datasets.Dataset:
    """Rows whose class is whether their first token is in the upper half of the vocabulary."""
    random = np.random.default_rng(seed)
    ids = [random.integers(1, VOCABULARY, random.integers(2, 9)).tolist() for _ in range(count)]
    labels = [int(row[0] >= VOCABULARY // 2) for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [len(row) for row in ids]})


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pads with token 0, which no row holds."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor([row["labels"] for row in rows])}
