"""Perceptrons that trained tables go through, to train more steadily than by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from finegraft.deltas.delta import Shapes

_WEIGHT, _BIAS = "layer_", "bias_"


def mlp_shapes(widths: Sequence[int]) -> Shapes:
    """Shapes of linear layers from each width to the next, with biases: ``layer_0``, ``bias_0`` ..."""
    found: Shapes = {}
    for number, (width, out) in enumerate(pairwise(widths)):
        found |= {f"{_WEIGHT}{number}": (out, width), f"{_BIAS}{number}": (out,)}
    return found


def mlp_initial(shapes: Shapes, rng: torch.Generator) -> dict[str, Tensor]:
    """Their start: uniform in ``1 / sqrt(width)``, as PyTorch's linear layers."""
    found = {}
    for name, shape in shapes.items():
        if name.startswith((_WEIGHT, _BIAS)):
            width = shapes[f"{_WEIGHT}{name.rpartition('_')[2]}"][-1]
            found[name] = (2 * torch.rand(shape, generator=rng) - 1) * width**-0.5
    return found


def mlp(p: Any, x: Float[Tensor, "... width"], activation: Callable[[Tensor], Tensor]) -> Float[Tensor, "... out"]:
    """What the layers make of ``x``, the activation between each two."""
    number = 0
    while hasattr(p, f"{_WEIGHT}{number}"):
        x = torch.nn.functional.linear(
            activation(x) if number else x, getattr(p, f"{_WEIGHT}{number}"), getattr(p, f"{_BIAS}{number}")
        )
        number += 1
    return x
