"""The models of the zoo as bases for the laws, with labels where they give a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finegraft.testing.bases import Base
from tests.models import zoo

_CLASSIFIERS = ("bert", "roberta", "distilbert", "albert", "vit", "ast")
_LANGUAGE_MODELS = ("bert-mlm", "llama", "llama-tied", "gpt2", "gpt-neox", "phi3", "mixtral", "qwen2-moe")


def labelled(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of the zoo, its batch with labels."""
    model, batch = zoo.build(name)
    if name in _CLASSIFIERS:
        batch["labels"] = torch.tensor([0, 1])
    elif name in _LANGUAGE_MODELS:
        batch["labels"] = batch["input_ids"]
    elif "decoder_input_ids" in batch:
        batch["labels"] = batch["decoder_input_ids"]
    return model, batch


def zoo_base(name: str) -> Base:
    """A model of the zoo as a base."""
    return Base(name, lambda: labelled(name), noise=0.02)
