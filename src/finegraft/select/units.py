"""Chosen units of a canonical matrix: reading them, adding to them, writing them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Matrix = Float[Tensor, "*batch out in"]
Values = Float[Tensor, "..."]


@dataclass(frozen=True, eq=False)
class Units:
    """Chosen units of a matrix ``(*batch, out, in)``.

    Attributes:
        unit: ``all``; ``entry`` (indices into the flattened matrix); ``row`` (into all rows, batches one after the
            other); ``column`` (into columns, the same in every batch).
        index: sorted indices, int64; empty for ``all``.
    """

    unit: Literal["all", "entry", "row", "column"]
    index: Int[Tensor, " chosen"] = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def flaw(self, matrix: tuple[int, ...]) -> str | None:
        """What is wrong with the indices for a matrix of this shape, or None."""
        index = self.index
        if index.dtype != torch.int64 or index.ndim != 1:
            return f"they are {index.dtype} of shape {tuple(index.shape)}, not a list of int64"
        if not len(index):
            return "there are none"
        if bool((index[1:] <= index[:-1]).any()):
            return "they are not sorted and distinct"
        entries = math.prod(matrix)
        units = {"entry": entries, "row": entries // matrix[-1], "column": matrix[-1]}[self.unit]
        low, high = int(index[0]), int(index[-1])
        if low < 0 or high >= units:
            return f"they run from {low} to {high}; there are {units} of unit {self.unit!r}, counted from 0"
        return None

    def shape(self, matrix: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the values at the chosen units, for a matrix of this shape."""
        if self.unit == "all":
            return matrix
        chosen = len(self.index)
        return {"entry": (chosen,), "row": (chosen, matrix[-1]), "column": (*matrix[:-1], chosen)}[self.unit]

    def gather(self, matrix: Matrix) -> Values:
        """A copy of the values at the chosen units."""
        if self.unit == "all":
            return matrix.clone()
        if self.unit == "entry":
            return matrix.reshape(-1)[self.index]
        if self.unit == "row":
            return matrix.reshape(-1, matrix.shape[-1])[self.index]
        return matrix.index_select(-1, self.index)

    def add(self, matrix: Matrix, values: Values) -> Matrix:
        """The matrix with ``values`` added at the chosen units, as a new tensor."""
        values = values.to(matrix.dtype)
        if self.unit == "all":
            return matrix + values
        if self.unit == "entry":
            return matrix.reshape(-1).index_add(0, self.index, values).view(matrix.shape)
        if self.unit == "row":
            return matrix.reshape(-1, matrix.shape[-1]).index_add(0, self.index, values).view(matrix.shape)
        return matrix.index_add(matrix.ndim - 1, self.index, values)

    def write_(self, matrix: Matrix, values: Values) -> None:
        """Set the chosen units in place; ``matrix`` may be any strided view of the stored tensor."""
        if self.unit == "all":
            matrix.copy_(values)
        elif self.unit == "column":
            matrix.index_copy_(matrix.ndim - 1, self.index, values)
        elif matrix.is_contiguous():
            flat = matrix.view(-1) if self.unit == "entry" else matrix.view(-1, matrix.shape[-1])
            flat.index_copy_(0, self.index, values)
        elif self.unit == "entry":
            matrix.index_put_(torch.unravel_index(self.index, matrix.shape), values)
        else:
            matrix.index_put_(torch.unravel_index(self.index, matrix.shape[:-1]), values)


EVERYTHING = Units("all")
