"""Code points at equal shares of a normal distribution (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from finegraft.quantised.blocks import blocked, pack, unpack, whole
from finegraft.quantised.quantiser import Codes, Quantiser
from finegraft.registry import quantisers

_EDGE = 0.9677083
"""Share of the normal distribution below its largest code point, as QLoRA has it."""
_SCALES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@quantisers.register("nf4")
class NormalFloat(Quantiser):
    """Blocks of numbers, each divided by its largest and rounded to the nearest of ``2^bits`` code points.

    The largest numbers of blocks are whole numbers of ``scale_bits`` bits themselves, between zero and the largest of
    ``scale_block`` of them (double quantisation). The defaults take 4.127 bits a number.

    Attributes:
        width: bits of a code point.
        block: numbers that share a scale.
        scale_bits: bits of a scale.
        scale_block: scales that share a scale of their own.
        scale_type: precision of the scales of scales.
    """

    kind = "nf4"

    width: Annotated[int, Field(ge=2, le=8)] = 4
    block: PositiveInt = 64
    scale_bits: Annotated[int, Field(ge=2, le=8)] = 8
    scale_block: PositiveInt = 256
    scale_type: Literal["float32", "bfloat16", "float16"] = "float32"

    def quantise(self, w: Tensor) -> Codes:
        rows = blocked(w.float(), self.block)
        steps, tops = self._scales(rows)
        scales = self._scale(steps, tops)
        points = code_points(self.width).to(w.device)
        middles = (points[1:] + points[:-1]) / 2
        nearest = torch.bucketize(rows / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1), middles)
        return {"codes": pack(nearest.flatten(), self.width), "scales": pack(steps, self.scale_bits), "tops": tops}

    def dequantise(self, codes: Codes, shape: tuple[int, ...]) -> Tensor:
        blocks = -(-shape[0] * shape[1] // self.block)
        scales = self._scale(unpack(codes["scales"], self.scale_bits, blocks), codes["tops"])
        points = code_points(self.width).to(codes["codes"].device)
        rows = points[unpack(codes["codes"], self.width, blocks * self.block)].view(blocks, self.block)
        return whole(rows * scales.unsqueeze(-1), shape)

    def bits(self, codes: Codes, shape: tuple[int, ...]) -> float:
        top = torch.finfo(_SCALES[self.scale_type]).bits
        return self.width + self.scale_bits / self.block + top / (self.block * self.scale_block)

    def bound(self, w: Tensor) -> Tensor:
        rows = blocked(w.float(), self.block)
        largest = rows.abs().amax(-1)
        scales = self._scale(*self._scales(rows))
        half_gap = code_points(self.width).diff().max().to(w.device) / 2
        # A scale that was rounded down leaves the largest number outside of the code points.
        return whole(
            (half_gap * scales + (largest - scales).clamp_min(0)).unsqueeze(-1).expand_as(rows), tuple(w.shape)
        )

    def _scales(self, rows: Float[Tensor, "blocks size"]) -> tuple[Tensor, Tensor]:
        largest = rows.abs().amax(-1)
        groups = blocked(largest, self.scale_block)
        tops = groups.amax(-1).to(_SCALES[self.scale_type])
        steps = 2**self.scale_bits - 1
        share = groups / tops.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        return (share * steps).round().clamp(0, steps).long().flatten()[: len(largest)], tops

    def _scale(self, steps: Tensor, tops: Tensor) -> Float[Tensor, " blocks"]:
        return steps / (2**self.scale_bits - 1) * tops.float().repeat_interleave(self.scale_block)[: len(steps)]


@cache
def code_points(bits: int) -> Float[Tensor, " points"]:
    """``2^bits`` quantiles of a normal distribution from -1 to 1, half of them above zero, and zero itself."""
    half = 2 ** (bits - 1)
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(_EDGE, 0.5, half + 1, dtype=torch.float64))[:-1]
    below = -normal.icdf(torch.linspace(_EDGE, 0.5, half, dtype=torch.float64))[:-1]
    points = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (points / points.max()).float()
