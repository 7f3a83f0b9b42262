"""How each type of layer computes, so that one kind of change works on all of them.

Every change is written for a *canonical matrix* of shape ``(*batch, out, in)``. An op translates
between that matrix and the tensor as the layer stores it, and applies changed weights to inputs.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finegraft.locate.low_rank_linear import add_low_rank
from finegraft.quantised.stored import is_quantised

_CONVS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


class Op:
    """A bare tensor: it has a matrix, but no input of its own.

    Attributes:
        type: the word used in queries (``where: {type: linear}``).
        out_axis: the axis of the canonical matrix that indexes output channels.
        channels: the axis of the layer's output that holds the output channels.
        callable: whether the site is a function of an input, rather than a tensor read by one.
    """

    type: ClassVar[str] = "tensor"
    out_axis: ClassVar[int] = -2
    channels: ClassVar[int] = -1
    callable: ClassVar[bool] = False

    def matrix(self, tensor: Tensor) -> Tensor:
        """The tensor as a canonical matrix; a view wherever strides allow it."""
        return tensor.view(-1, 1) if tensor.ndim < 2 else tensor

    def restore(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The canonical matrix back in its natural shape."""
        return matrix.reshape(shape)

    def apply(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The layer's output under another weight (natural shape), or None where only the layer knows how."""
        return None

    def add_low_rank(
        self, module: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        """``y`` plus what the weight change ``scale * b @ a`` adds to it."""
        raise NotImplementedError(self.type)

    def holds_bias(self, module: Any) -> bool:
        """Whether the module's own forward adds a bias when it is given one."""
        return False

    def on_channels(self, vector: Float[Tensor, " out"], y: Tensor) -> Tensor:
        """A vector over output channels, shaped and typed to broadcast against the output ``y``."""
        return vector.to(y.dtype)


class LinearOp(Op):
    """``nn.Linear``: the weight is its own canonical matrix."""

    type = "linear"
    callable = True

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor

    def holds_bias(self, module: Any) -> bool:
        return True

    def apply(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if is_quantised(module._parameters.get("weight")):
            return F.linear(x, weight.to(x.dtype), bias)
        return F.linear(x, weight, bias) if plain(module) else None

    def add_low_rank(
        self, module: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        return add_low_rank(x, y, a, b, scale=scale, dropout=dropout)


class TransposedLinearOp(LinearOp):
    """GPT-2's ``Conv1D``: a linear layer that stores ``(in, out)``."""

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2)

    def restore(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.transpose(-1, -2)

    def apply(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return F.linear(x, weight.transpose(-1, -2), bias) if plain(module) else None


class ConvOp(Op):
    """Convolutions: the matrix is ``(out, in / groups * kernel)``."""

    type = "conv"
    channels = 1
    callable = True

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(1)

    def holds_bias(self, module: Any) -> bool:
        return True

    def apply(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return module._conv_forward(x, weight, bias) if plain(module) else None

    def add_low_rank(
        self, module: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        kernel = module.weight.shape[2:]
        if module.groups > 1:
            change = (b @ a).view(module.weight.shape).to(x.dtype)
            return y + scale * module._conv_forward(F.dropout(x, dropout), change, None)
        down = a.view(a.shape[0], -1, *kernel).to(x.dtype)
        hidden = module._conv_forward(F.dropout(x, dropout), down, None)
        conv = _CONVS[next(cls for cls in _CONVS if isinstance(module, cls))]
        return y + scale * conv(hidden, b.view(*b.shape, *[1] * len(kernel)).to(hidden.dtype))

    def on_channels(self, vector: Float[Tensor, " out"], y: Tensor) -> Tensor:
        return vector.to(y.dtype).view(-1, *[1] * (y.ndim - 2))


class EmbeddingOp(Op):
    """``nn.Embedding``: the matrix is ``(entries, width)`` as stored, so that a tied output layer shares it."""

    type = "embedding"
    out_axis = -1
    callable = True

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor

    def apply(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not plain(module):
            return None
        y = F.embedding(
            x, weight, module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq, module.sparse
        )
        return y if bias is None else y + bias.to(y.dtype)

    def add_low_rank(
        self, module: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        hidden = F.dropout(F.embedding(x, b.to(y.dtype)), dropout)
        scale = scale * getattr(
            module, "embed_scale", 1.0
        )  # Transformers' scaled embeddings multiply what they look up
        return y + scale * (hidden @ a.to(y.dtype))


class NormOp(Op):
    """Normalisations: the gain is a diagonal, kept as a ``(width, 1)`` matrix."""

    type = "norm"
    callable = True

    def holds_bias(self, module: Any) -> bool:
        return isinstance(module, nn.LayerNorm)

    def apply(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if plain(module):
            return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        return None

    def on_channels(self, vector: Float[Tensor, " out"], y: Tensor) -> Tensor:
        return vector.to(y.dtype)

    @torch.no_grad()
    def unit_gain(self, module: Any) -> float:
        """What the layer stores for a gain of one: zero where it adds the one itself, as Gemma's norms do."""
        if isinstance(module, _NORMS):
            return 1.0
        twin = copy.copy(module)
        twin.__class__ = getattr(type(module), "_finegraft_base", type(module))
        twin.__dict__["_modules"] = {}
        twin.__dict__["_parameters"] = {
            n: t if t is None else torch.zeros_like(t) for n, t in module._parameters.items()
        }
        weight = module._parameters["weight"]
        return 0.0 if bool(twin.forward(torch.linspace(-1, 1, len(weight)).to(weight)).any()) else 1.0


class ChannelNormOp(NormOp):
    """Batch and group normalisation, whose channels are the second axis."""

    channels = 1

    def on_channels(self, vector: Float[Tensor, " out"], y: Tensor) -> Tensor:
        return vector.to(y.dtype).view(-1, *[1] * (y.ndim - 2))


class SublayerOp(Op):
    """A whole sublayer: ``(out, in)`` are the widths of what it gives and takes; it has no weight of its own."""

    type = "sublayer"
    callable = True


class BlockOp(SublayerOp):
    """A whole block, residuals included."""

    type = "block"


class AttentionOp(Op):
    """An attention call: a function of queries, keys and values."""

    type = "attention"


class NetworkOp(SublayerOp):
    """A whole stack of blocks."""

    type = "network"


class InputOp(Op):
    """The sequence that enters a stack of blocks; its matrix stands for the width of its vectors, ``(width, 1)``."""

    type = "input"


TENSOR, LINEAR, TRANSPOSED, CONV, EMBEDDING = Op(), LinearOp(), TransposedLinearOp(), ConvOp(), EmbeddingOp()
NORM, CHANNEL_NORM = NormOp(), ChannelNormOp()
SUBLAYER, BLOCK, NETWORK, ATTENTION, INPUT = SublayerOp(), BlockOp(), NetworkOp(), AttentionOp(), InputOp()


_PLAIN: tuple[Any, ...] = (nn.Linear, Conv1D, *_CONVS, nn.Embedding, nn.LayerNorm)


def plain(module: nn.Module) -> bool:
    """Whether a layer computes as its type does, rather than by a forward of a subclass's own."""
    own = getattr(type(module), "_finegraft_base", type(module)).forward
    return any(own is cls.forward for cls in _PLAIN)


def tensor_op(tensor: Tensor) -> Op:
    """The op of a bare tensor."""
    return TENSOR


def op_for(module: nn.Module) -> Op | None:
    """The op of a layer, or None when the module is no layer that finegraft knows.

    ``NonDynamicallyQuantizableLinear`` (the output projection of ``nn.MultiheadAttention``) is None: its
    weight is read without calling it, so it can only be changed as a bare tensor.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, Conv1D):
        return TRANSPOSED
    if isinstance(module, tuple(_CONVS)):
        return CONV
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    weight = getattr(module, "_parameters", {}).get("weight")
    if weight is not None and isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
        return CHANNEL_NORM
    named_norm = weight is not None and weight.ndim == 1 and type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    if weight is not None and (isinstance(module, _NORMS) or named_norm):
        return NORM
    return None
