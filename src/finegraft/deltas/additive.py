"""What kinds share that add a matrix to the weight."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finegraft.deltas.delta import Delta, Layer
from finegraft.deltas.rebuilding import rebuilding_weight
from finegraft.locate.low_rank_linear import add_low_rank

MATRICES = ("linear", "conv", "embedding", "tensor")
"""Site types with a matrix of two axes."""


class Additive(Delta):
    """``W + D``. A kind says what ``D`` is; where ``D x`` is cheaper than a dense product, it says that too."""

    on = MATRICES

    @abstractmethod
    def change(self, p: Any) -> Float[Tensor, "*batch out in"]:
        """The matrix ``D``."""

    def act(self, p: Any, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """``D x`` for each row of ``x``, without building ``D``."""
        raise NotImplementedError(self.kind)

    @property
    def reads_weight(self) -> bool:
        return type(self).act is Additive.act

    def weight(self, p: Any, w: Tensor) -> Tensor:
        return w + self.change(p).to(w.dtype)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        if self.reads_weight:
            return rebuilding_weight(self, p, layer, x)
        y = layer(x)
        if layer.op.type == "linear":
            return y + self._acted(p, x.to(y.dtype)).to(y.dtype)
        change = self.change(p).to(y.dtype)
        return y + (F.embedding(x, change) if layer.op.type == "embedding" else layer.apply(x, change, None))

    def _acted(self, p: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.act(p, x)
        # Transforms and inner products are done again in backward, for they are cheap, but as wide as the input.
        y: Tensor = checkpoint(self.act, p, x, use_reentrant=False, preserve_rng_state=False)
        return y


class Factored(Delta):
    """``W + B A`` with narrow factors that a kind makes of its tensors."""

    on = MATRICES

    @abstractmethod
    def factors(self, p: Any) -> tuple[Float[Tensor, "*batch rank in"], Float[Tensor, "*batch out rank"]]:
        """``A`` and ``B``."""

    def inner_width(self, p: Any) -> int:
        """Width of the factors, for kinds where it can be so large that a dense product takes less; 0 for others."""
        return 0

    def weight(self, p: Any, w: Tensor) -> Tensor:
        a, b = self.factors(p)
        return w + (b @ a).to(w.dtype)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        if self.dense_takes_less(p, layer, x):
            return rebuilding_weight(self, p, layer, x)
        a, b = self.factors(p)
        if self.inner_width(p) and layer.op.type == "linear":
            # Factors that may be as large as weights are made again in backward, instead of being kept.
            return add_low_rank(x, layer(x), a, b, scale=1.0, remake=lambda: self.factors(p))
        return layer.op.add_low_rank(layer.module, x, layer(x), a, b, scale=1.0, dropout=0.0)

    def dense_takes_less(self, p: Any, layer: Layer, x: Tensor) -> bool:
        """Whether a training step on ``x`` multiplies less with the dense sum of the weight and ``B A``.

        Counted is what comes on top of the layer's own step, where one factor trains: for the dense sum its gradient
        and three products as large as ``B A``, for the factors their products and those of gradients.
        """
        width = self.inner_width(p)
        if not width or not layer.bare or layer.op.type != "linear":
            return False
        out, into = layer.weight.shape
        tokens = x.numel() // into
        return out * into * (tokens + 3 * width) < tokens * width * (2 * (out + into) + min(out, into))
