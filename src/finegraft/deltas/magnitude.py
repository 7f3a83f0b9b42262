"""The magnitude half of a weight decomposition (DoRA, Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes, along_out, channel_norms, precise
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("magnitude")
class Magnitude(Delta):
    """``diag(m) V / |V|`` for the weight ``V`` beneath, row by row; ``m`` starts at the base's row norms.

    Put above another change (``what: [low-rank, magnitude]``) it trains direction and length apart. As in the paper the
    norm counts as a constant in backward.
    """

    kind = "magnitude"
    reads_weight: ClassVar[bool] = True
    on = ("linear", "conv", "embedding", "tensor")

    def shapes(self, site: Site) -> Shapes:
        return {"magnitude": (*site.batch, site.channels)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"magnitude": channel_norms(precise(site.weight), site.op)}

    def weight(self, p: Any, w: Tensor) -> Tensor:
        return w * along_out(_ratio(p.magnitude, channel_norms(w.detach(), p.op)), p.op, w.dtype)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        y = layer(x)
        ratio = layer.op.on_channels(_ratio(p.magnitude, layer.row_norms()), y)
        bias = None if layer.bias is None else layer.op.on_channels(layer.bias, y)
        if torch.compiler.is_compiling() or p.op.channels != -1:
            return y * ratio if bias is None else (y - bias) * ratio + bias
        return _ScaleKeepingOutput.apply(y, ratio, bias)


def _ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    # A row of zeros has no direction; it stays zero.
    return magnitude / norms.to(magnitude.dtype).clamp_min(torch.finfo(magnitude.dtype).tiny)


class _ScaleKeepingOutput(torch.autograd.Function):
    """``(y - bias) * ratio + bias``, keeping the output for backward, which the next layer often keeps anyway.

    Backward divides by the ratio to find ``y`` again, so the gradient of a ratio near zero loses digits; ratios start
    at one. At exactly zero it is zero.
    """

    @staticmethod
    def forward(ctx, y, ratio, bias):
        out = y * ratio
        if bias is not None:
            out += bias * (1 - ratio)
        ctx.save_for_backward(out, ratio, bias)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, ratio, bias = ctx.saved_tensors
        core = out if bias is None else out - bias
        summed = (grad * core).flatten(0, -2).sum(0)
        grad_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0) * (1 - ratio)
        return grad * ratio, summed / torch.where(ratio == 0, 1, ratio), grad_bias
