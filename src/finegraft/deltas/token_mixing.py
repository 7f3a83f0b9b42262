"""What an adapter may do between its projections: convolutions over a grid of tokens, and routing functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from finegraft.deltas.delta import Shapes
from finegraft.errors import SiteError
from finegraft.inits.factors import kaiming_uniform

Convolution = Literal["none", "depthwise", "conformer", "branches"]
Routing = Literal["none", "product", "sum", "map", "attention"]
Tokens = Float[Tensor, "batch tokens width"]

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_REDUCTION = 16  # of the widths inside the branches of DETRIS


def shapes(convolution: Convolution, width: int, kernel: int, dims: int) -> Shapes:
    """Shapes of the tensors of a convolution over a grid of ``dims`` axes."""
    if convolution == "none":
        return {}
    if convolution == "branches":
        one, two, three = branch_widths(width)
        inner = max(1, width // _REDUCTION)
        return {
            "branch_1": (one, width),
            "branch_2_in": (inner, width + one),
            "branch_2": (two, inner, *[3] * dims),
            "branch_3_in": (inner, width + one + two),
            "branch_3": (three, inner, *[5] * dims),
        }
    plain = {"conv": (width, 1, *[kernel] * dims), "conv_bias": (width,)}
    return plain if convolution == "depthwise" else {**plain, "mid_gain": (width,), "mid_bias": (width,)}


def initial(convolution: Convolution, shapes: Shapes, rng: torch.Generator) -> dict[str, Tensor]:
    """Kernels as ``nn.Conv`` starts, gains at one."""
    found = {}
    for name, shape in shapes.items():
        if name == "mid_gain":
            found[name] = torch.ones(shape)
        elif len(shape) > 1:
            found[name] = kaiming_uniform((shape[0], math.prod(shape[1:])), rng).view(shape)
    return found


def branch_widths(width: int) -> tuple[int, int, int]:
    """Outputs of the three branches, together ``width``."""
    return width // 2, width // 4, width - width // 2 - width // 4


def convolved(convolution: Convolution, p: Any, z: Float[Tensor, "batch *grid width"]) -> Tensor:
    """A convolution over all axes between the first and the last."""
    z = z.movedim(-1, 1)
    z = z + _branches(p, z) if convolution == "branches" else _conv(z, p.conv, p.conv_bias, groups=z.shape[1])
    z = z.movedim(1, -1)
    if convolution != "conformer":
        return z
    return F.silu(F.layer_norm(z, z.shape[-1:], p.mid_gain.to(z.dtype), p.mid_bias.to(z.dtype)))


def _conv(z: Tensor, kernel: Tensor, bias: Tensor | None = None, *, groups: int = 1) -> Tensor:
    dims = kernel.ndim - 2
    bias = None if bias is None else bias.to(z.dtype)
    return _CONVS[dims](z, kernel.to(z.dtype), bias, padding=kernel.shape[-1] // 2, groups=groups)


def _branches(p: Any, z: Tensor) -> Tensor:
    """Branches of growing reach, each of which sees the input and the branches before it."""
    points = [1] * (z.ndim - 2)
    one = F.relu(_conv(z, p.branch_1.view(*p.branch_1.shape, *points)))
    seen = torch.cat([z, one], dim=1)
    two = F.relu(_conv(_conv(seen, p.branch_2_in.view(*p.branch_2_in.shape, *points)), p.branch_2))
    seen = torch.cat([seen, two], dim=1)
    three = F.relu(_conv(_conv(seen, p.branch_3_in.view(*p.branch_3_in.shape, *points)), p.branch_3))
    return torch.cat([one, two, three], dim=1)


def on_grid(change: Callable[[Tensor], Tensor], z: Tokens, front: int, grid: tuple[int, ...] | None) -> Tokens:
    """Apply ``change`` to the tokens after the first ``front``, laid out as a grid; None is one line.

    Raises:
        SiteError: the grid has another number of places than there are tokens.
    """
    before, body = z[:, :front], z[:, front:]
    if body.shape[1] == 0:
        return z
    if grid is None:
        changed = change(body)
    else:
        if math.prod(grid) != body.shape[1]:
            raise SiteError(
                f"a grid of {' x '.join(map(str, grid))} has {math.prod(grid)} places; there are {body.shape[1]} "
                f"tokens after the first {front}: set grid and front to what the model takes"
            )
        changed = change(body.unflatten(1, grid)).flatten(1, -2)
    return torch.cat([before, changed], dim=1) if front else changed


def routed(routing: Routing, z: Tokens, front: int) -> Tokens:
    """The bottleneck's tokens brought together with the first ``front`` of them, which are the other modality's.

    ``product``, ``sum`` and ``map`` take the mean of these tokens, or of all where ``front`` is 0; ``attention`` is
    unnormalised linear attention over them (Qu et al. 2024, arXiv:2403.09377).
    """
    other = z[:, :front] if front else z
    mean = other.mean(dim=1, keepdim=True)
    if routing == "product":
        return z * mean
    if routing == "sum":
        return z + mean
    if routing == "map":
        return z.sum(dim=-1, keepdim=True) * mean
    return (z @ other.transpose(1, 2)) @ other
