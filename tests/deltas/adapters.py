"""Grafts of adapters for tests."""

from __future__ import annotations

import torch

from finegraft.grafting.graft import Graft
from finegraft.grafting.make import graft
from finegraft.testing.base_models import Transformer
from finegraft.testing.bases import leading


def put(model, what, where="ffn", **more) -> Graft:
    """A graft of one part without heads."""
    return graft(model, {"parts": [{"where": {"role": where}, "what": what}], "heads": "none", **more})


def bottleneck(**settings) -> dict:
    """The data of an adapter."""
    return {"kind": "bottleneck", **settings}


def transformer():
    """A small model and its input."""
    torch.manual_seed(0)
    return Transformer(8, 16, 4).eval(), torch.randn(3, 6, 8)


@torch.no_grad()
def stir(made: Graft, seed: int = 0, size: float = 0.3) -> None:
    """Add noise to what trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def output(model, batch):
    """The leading output, without gradient."""
    with torch.no_grad():
        return leading(model(**batch))
