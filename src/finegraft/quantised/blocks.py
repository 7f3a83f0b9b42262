"""Whole numbers packed into bytes, and numbers scaled block by block."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor


def pack(codes: Int[Tensor, " count"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Whole numbers of ``bits`` bits, from zero on, one behind the other in bytes."""
    if bits == 8:
        return codes.to(torch.uint8)
    places = torch.arange(bits, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> places) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Int[Tensor, " count"]:
    """The first ``count`` numbers that :func:`pack` packed."""
    if bits == 8:
        return packed[:count].long()
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten()[:count].long()
    stream = ((packed.unsqueeze(-1).long() >> torch.arange(8, device=packed.device)) & 1).flatten()
    stream = stream[: count * bits].view(count, bits)
    return (stream << torch.arange(bits, device=packed.device)).sum(-1)


def blocked(w: Tensor, size: int) -> Float[Tensor, "blocks size"]:
    """The numbers in rows of a size, filled up with zeros."""
    flat = w.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def whole(blocks: Float[Tensor, "blocks size"], shape: tuple[int, ...]) -> Tensor:
    """The numbers back in their shape, without the filling."""
    return blocks.flatten()[: math.prod(shape)].view(shape)
