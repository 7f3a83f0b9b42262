"""A weight of a linear layer that is kept as codes, and made dense anew whenever it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from finegraft.errors import StoreError
from finegraft.quantised.quantiser import Codes, Quantiser

LeftOut = tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]

_aten: Any = torch.ops.aten


class QuantisedTensor(torch.Tensor):
    """A matrix of a shape and precision whose memory is the codes of a quantiser.

    In ``F.linear`` it is dense for the moment of the product, in forward and again in backward (ModuLoRA, Yin et al.
    2023, arXiv:2309.16119); any other function sees the dense matrix.

    Attributes:
        codes: what the quantiser made of it.
        quantiser: the format.
        left_out: factors ``(A, B)`` whose product the quantisation left out, for starts that make up for it; or None.
    """

    codes: Codes
    quantiser: Quantiser
    left_out: LeftOut | None

    @staticmethod
    def __new__(
        cls, codes: Codes, quantiser: Quantiser, shape: Any, dtype: torch.dtype, left_out: LeftOut | None = None
    ) -> QuantisedTensor:
        device = next(iter(codes.values())).device
        made: QuantisedTensor = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=False
        )
        made.codes, made.quantiser, made.left_out = codes, quantiser, left_out
        return made

    @classmethod
    def of(cls, w: Float[Tensor, "out in"], quantiser: Quantiser) -> QuantisedTensor:
        """A dense matrix, quantised."""
        return cls(quantiser.quantise(w.detach().float()), quantiser, w.shape, w.dtype)

    def dequantize(self) -> Tensor:
        """The dense matrix, in the precision that the tensor says it has."""
        return self.quantiser.dequantise(self.codes, tuple(self.shape)).to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantisedTensor({tuple(self.shape)}, {self.dtype}, {self.quantiser!r})"

    def _changed(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> QuantisedTensor:
        codes = {name: change(tensor) for name, tensor in self.codes.items()}
        left_out = None if self.left_out is None else (change(self.left_out[0]), change(self.left_out[1]))
        return QuantisedTensor(codes, self.quantiser, self.shape, dtype or self.dtype, left_out)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        for name, tensor in self.codes.items():
            setattr(self, f"_code_{name}", tensor)
        return [f"_code_{name}" for name in self.codes], (self.quantiser, self.dtype, self.left_out)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> QuantisedTensor:
        quantiser, dtype, left_out = context
        codes = {name.removeprefix("_code_"): tensor for name, tensor in inner.items()}
        return QuantisedTensor(codes, quantiser, size, dtype, left_out)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func is torch.Tensor.storage:
            raise StoreError(
                "a quantised weight is not saved: make the base dense first (fg.dequantise), or save the dense base "
                "and quantise it after loading"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, QuantisedTensor):
            if func in (_aten.detach.default, _aten.alias.default):
                return first._changed(lambda t: t)
            if func is _aten.clone.default:
                return first._changed(torch.clone)
            if func is _aten._to_copy.default:
                device = kwargs.get("device")
                return first._changed(lambda t: t.to(device) if device is not None else t.clone(), kwargs.get("dtype"))
            if func is _aten.copy_.default:
                return _copy_into(first, args[1])
        return func(*torch.utils._pytree.tree_map(_dense, args), **torch.utils._pytree.tree_map(_dense, kwargs))


def _copy_into(held: QuantisedTensor, source: Tensor) -> QuantisedTensor:
    same = isinstance(source, QuantisedTensor) and source.quantiser == held.quantiser
    codes = getattr(source, "codes", {}) if same else held.quantiser.quantise(_dense(source).float())
    for name, tensor in held.codes.items():
        tensor.copy_(codes[name])
    return held


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantisedTensor) else value


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            return _DequantisedLinear.apply(input, weight, bias)
    y: Tensor = _DequantisedLinear.apply(input, weight, bias)
    return y


class _DequantisedLinear(torch.autograd.Function):
    """A product with a weight of which only the codes are kept for backward."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return F.linear(x, _dense(weight).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _dense(ctx.weight).to(grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, None, grad_bias
