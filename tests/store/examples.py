"""Grafts for the store's tests, and what it means that two are the same."""

import torch
from torch import Tensor

from finegraft.store import Fingerprint, Manifest, fingerprint

SMALL = {
    "layer.0.a": torch.tensor([[0.5, -1.25], [3.0, float("nan")]]),
    "layer.0.rows": torch.tensor([3, 4, 900, 901, 70_000]),
    "layer.0.kept": torch.tensor([True, False, True]),
}


def base_fingerprint() -> Fingerprint:
    return fingerprint([("weight", torch.arange(6.0).reshape(2, 3))], name="owner/base")


def manifest(**changes) -> Manifest:
    fields = {
        "recipe": {"name": "lora", "rank": 8},
        "seed": 0,
        "fingerprint": base_fingerprint(),
        "sites": [{"name": "layer.0", "kind": "low-rank", "tensors": ["a"]}],
        "task": {"kind": "classification", "labels": ["negativ", "größer 好"]},
        "metrics": {"accuracy": 0.875},
        "provenance": {"torch": "2.13", "parents": []},
    }
    return Manifest(**(fields | changes))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names, types, shapes and bits; NaNs of one bit pattern are equal."""
    return left.keys() == right.keys() and all(_same_bits(left[name], right[name]) for name in left)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*bits)
