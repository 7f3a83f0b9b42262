"""Forward under a changed weight that is built again in backward, instead of being kept from the one to the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finegraft.deltas.delta import Delta, Layer


def rebuilding_weight(delta: Delta, p: Any, layer: Layer, x: Tensor) -> Tensor:
    """The layer under ``delta.weight``, keeping its input and the trained tensors and no dense tensor of its own.

    Backward builds the weight a second time; the product with the input is not repeated, since recomputing stops at
    the last tensor that backward needs. Norms run as they are: their gain is a vector.

    Args:
        delta: a kind whose :meth:`~finegraft.deltas.delta.Delta.weight` draws no random numbers.
        p: its tensors at the site.
        layer: the layer beneath.
        x: its input.
    """

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return layer.apply(x, delta.weight(p, weight), delta.bias_over(p, bias, lambda: weight))

    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or layer.op.type == "norm":
        return run(x, layer.weight, layer.bias)
    y: Tensor = checkpoint(run, x, layer.weight, layer.bias, use_reentrant=False, preserve_rng_state=False)
    return y
