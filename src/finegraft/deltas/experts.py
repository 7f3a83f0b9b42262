"""Several tensors in the place of one: one of them acts in each pass of training, all of them together afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from finegraft.deltas.delta import Shapes

Join = Literal["mean", "union"]


def check_experts(number: int, join: Join, projection: str, init: str) -> None:
    """Raise :class:`ValueError` where experts cannot be joined so."""
    if join == "union" and (projection != "dense" or init != "lora"):
        raise ValueError(
            "join: union needs dense projections and init: lora: entries that an expert does not own stay at zero, "
            "where they start"
        )
    if number > 1 and projection == "binary":
        raise ValueError("experts are not there for binary projections")


def stacked_shapes(shapes: Shapes, number: int) -> Shapes:
    """Shapes with an axis of experts before the others; none for a single one."""
    return shapes if number == 1 else {name: (number, *shape) for name, shape in shapes.items()}


def stacked_initial(draw: Callable[[], dict[str, Tensor]], number: int, shapes: Shapes) -> dict[str, Tensor]:
    """The starts of all experts, drawn one by one."""
    drawn = [draw() for _ in range(number)]
    if number == 1:
        return drawn[0]
    return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0] if name in shapes}


def chosen(tensor: Tensor, number: int, join: Join, index: Int[Tensor, 1] | None = None) -> Tensor:
    """One expert's tensor, or without an index their mean; under a union all have the same one."""
    if number == 1 or join == "union":
        return tensor
    return tensor.mean(dim=0) if index is None else tensor.index_select(0, index).squeeze(0)


def owners(shape: tuple[int, ...], number: int, site: str) -> Int[Tensor, "*shape"]:
    """A random partition: which expert owns each entry; it follows from the site's name."""
    seed = int.from_bytes(hashlib.sha256(site.encode()).digest()[:7], "big")
    return torch.randint(number, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
