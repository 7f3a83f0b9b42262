"""Whole numbers at equal distances, scaled group by group of a row."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from finegraft.quantised.blocks import blocked, pack, unpack, whole
from finegraft.quantised.quantiser import Codes, Quantiser
from finegraft.registry import quantisers


@quantisers.register("int8")
class Uniform(Quantiser):
    """``round(w / scale)`` with one scale for each block of numbers, such that the largest fits.

    Attributes:
        width: bits of a number.
        block: numbers that share a scale.
    """

    kind = "int8"

    width: Annotated[int, Field(ge=2, le=8)] = 8
    block: PositiveInt = 128

    @property
    def _largest(self) -> int:
        return int(2 ** (self.width - 1)) - 1

    def quantise(self, w: Tensor) -> Codes:
        rows = blocked(w.float(), self.block)
        scales = rows.abs().amax(-1) / self._largest
        steps = (rows / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().long()
        return {"codes": pack((steps + self._largest).flatten(), self.width), "scales": scales}

    def dequantise(self, codes: Codes, shape: tuple[int, ...]) -> Tensor:
        scales = codes["scales"]
        steps = unpack(codes["codes"], self.width, len(scales) * self.block) - self._largest
        return whole(steps.view(len(scales), self.block) * scales.unsqueeze(-1), shape)

    def bound(self, w: Tensor) -> Tensor:
        rows = blocked(w.float(), self.block)
        half = rows.abs().amax(-1, keepdim=True) / self._largest / 2
        return whole(half.expand_as(rows), tuple(w.shape))


@quantisers.register("int4")
class Uniform4(Uniform):
    """The same in four bits and smaller blocks."""

    kind = "int4"

    width: Annotated[int, Field(ge=2, le=8)] = 4
    block: PositiveInt = 32
