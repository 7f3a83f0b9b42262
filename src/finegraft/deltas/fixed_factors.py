"""Products with fixed factors and trained vectors between and after them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def add_between(
    x: Float[Tensor, "*tokens in"],
    y: Float[Tensor, "*tokens out"],
    a: Float[Tensor, "rank in"],
    b: Float[Tensor, "out rank"],
    inner: Float[Tensor, " rank"],
    outer: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*tokens out"]:
    """``y + outer * (b (inner * (a x)))`` in the dtype of ``y``, where only the vectors train.

    Saves the rank-wide product, and the out-wide one if there is an ``outer``: backward then takes no product more than
    forward does. The input is not kept.
    """
    if torch.compiler.is_compiling():
        change = F.linear(F.linear(x.to(y.dtype), a.to(y.dtype)) * inner.to(y.dtype), b.to(y.dtype))
        return y + (change if outer is None else change * outer.to(y.dtype))
    return _AddBetween.apply(x, y, a, b, inner, outer)


class _AddBetween(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, inner: Tensor, outer: Tensor | None) -> Tensor:
        dtype = y.dtype
        hidden = F.linear(x.to(dtype), a.to(dtype))
        change = F.linear(hidden * inner.to(dtype), b.to(dtype))
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(hidden, None if outer is None else change, a, b, inner, outer)
        return y + change if outer is None else torch.addcmul(y, change, outer.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, change, a, b, inner, outer = ctx.saved_tensors
        dtype, flat, grad_outer = grad.dtype, grad.reshape(-1, grad.shape[-1]), None
        if outer is not None:
            product = flat * change.view_as(flat)
            grad_outer = product.sum(0).to(outer.dtype)
            flat = torch.mul(flat, outer.to(dtype), out=product)
        grad_hidden = flat @ b.to(dtype)
        grad_inner = (grad_hidden * hidden.view_as(grad_hidden)).sum(0).to(inner.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_hidden.mul_(inner.to(dtype)) @ a.to(dtype)).view(*grad.shape[:-1], -1).to(ctx.x_dtype)
        return grad_x, grad, None, None, grad_inner, grad_outer
