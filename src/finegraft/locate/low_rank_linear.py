"""The low-rank update of a linear layer, keeping for backward no more than it must."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def add_low_rank(
    x: Float[Tensor, "*tokens in"],
    y: Float[Tensor, "*tokens out"],
    a: Float[Tensor, "rank in"],
    b: Float[Tensor, "out rank"],
    *,
    scale: float,
    dropout: float = 0.0,
    remake: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> Float[Tensor, "*tokens out"]:
    """``y + scale * dropout(x) a^T b^T`` in the dtype of ``y``.

    Saves ``x`` (which neighbouring layers save anyway, and only if ``a`` trains) and the rank-wide product. The dropout
    mask is drawn from a seed and drawn again in backward, so it takes no memory. Nor do the factors, where ``remake``
    gives them again.
    """
    if torch.compiler.is_compiling():
        hidden = F.linear(F.dropout(x.to(y.dtype), dropout), a.to(y.dtype))
        return y + F.linear(hidden * scale, b.to(y.dtype))
    # The default generator gives the seed: torch.manual_seed and activation checkpointing stay in charge.
    seed = int(torch.randint(2**31, ())) if dropout > 0 else 0
    return _AddLowRank.apply(x, y, a, b, scale, dropout, seed, remake)


def _dropped(x: Tensor, dropout: float, seed: int) -> Tensor:
    if dropout == 0:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = 1.0 - dropout
    return torch.empty_like(x).bernoulli_(keep, generator=generator).div_(keep).mul_(x)


class _AddLowRank(torch.autograd.Function):
    # Rank-wide products are kept as (rank, tokens): with the short side first, a product streams through the wide
    # matrix once; the other orientation takes up to eight times as long on a CPU.

    @staticmethod
    def forward(ctx, x, y, a, b, scale, dropout, seed, remake):
        dtype = y.dtype
        tokens = _dropped(x.to(dtype), dropout, seed).reshape(-1, x.shape[-1])
        hidden = (a.to(dtype) @ tokens.t()).mul_(scale)
        ctx.scale, ctx.dropout, ctx.seed, ctx.remake = scale, dropout, seed, remake
        ctx.x_dtype, ctx.x_shape = x.dtype, x.shape
        needs_x = ctx.needs_input_grad[2]
        factors = (a, b) if remake is None else (None, None)
        ctx.save_for_backward(x if needs_x else None, *factors, hidden if ctx.needs_input_grad[3] else None)
        return torch.addmm(y.reshape(-1, y.shape[-1]), hidden.t(), b.to(dtype).t()).view(y.shape)

    @staticmethod
    def backward(ctx, grad):
        x, a, b, hidden = ctx.saved_tensors
        if ctx.remake is not None:
            a, b = ctx.remake()
        needs_x, _, needs_a, needs_b = ctx.needs_input_grad[:4]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_b = (hidden @ flat).t().to(b.dtype) if needs_b else None
        grad_x = grad_a = None
        if needs_x or needs_a:
            grad_hidden = (b.to(flat.dtype).t() @ flat.t()).mul_(ctx.scale)
        if needs_a:
            tokens = _dropped(x.to(flat.dtype), ctx.dropout, ctx.seed).reshape(flat.shape[0], -1)
            grad_a = (grad_hidden @ tokens).to(a.dtype)
        if needs_x:
            grad_x = (grad_hidden.t() @ a.to(flat.dtype)).view(ctx.x_shape)
            grad_x = _dropped(grad_x, ctx.dropout, ctx.seed).to(ctx.x_dtype)
        return grad_x, grad, grad_a, grad_b, None, None, None, None
