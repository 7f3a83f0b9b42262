"""Low-rank factors that are tensor trains themselves (LoRETTA, Yang et al. 2024, arXiv:2402.11417)."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Shapes
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("tensor-train")
class TensorTrain(Factored):
    """``W + (alpha / rank) B A`` where ``A`` and ``B`` are contracted from small tensors ``(t, n_i, t)``.

    The numbers of a factor are counted by digits ``n_i`` whose product is ``in * rank`` (``out * rank``). The train of
    ``B`` ends in zeros at the start.

    Attributes:
        rank: inner width of ``B A``.
        train_rank: width ``t`` of the trains.
        alpha: numerator of the scaling.
        digit: the largest ``n_i``, where the numbers have such divisors.
    """

    kind = "tensor-train"

    rank: PositiveInt = 8
    train_rank: PositiveInt = 5
    alpha: PositiveFloat = 16.0
    digit: PositiveInt = 12

    def shapes(self, site: Site) -> Shapes:
        return {
            f"{side}_{i}": (*site.batch, *core)
            for side, width in (("a", site.fan_in), ("b", site.fan_out))
            for i, core in enumerate(self._cores(width))
        }

    def _cores(self, width: int) -> list[tuple[int, int, int]]:
        digits = [*digits_of(width, self.digit), self.rank]
        ranks = [1, *[self.train_rank] * (len(digits) - 1), 1]
        return list(zip(ranks, digits, ranks[1:], strict=False))

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        start = {}
        shapes = self.shapes(site)
        share = (1 / (site.fan_in + site.fan_out)) ** 0.5
        for side in ("a", "b"):
            names = [name for name in shapes if name.startswith(side)]
            for name in names[: len(names) - (side == "b")]:
                size = share ** (1 / len(names)) / math.sqrt(shapes[name][-1])
                start[name] = size * torch.randn(shapes[name], generator=rng)
        return start

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        a, b = (self._contracted(p, side) for side in ("a", "b"))
        return a.transpose(-1, -2), self.alpha / self.rank * b

    def _contracted(self, p: Any, side: str) -> Float[Tensor, "*batch width rank"]:
        cores: list[Tensor] = []
        while hasattr(p, f"{side}_{len(cores)}"):
            cores.append(getattr(p, f"{side}_{len(cores)}"))
        return contract(cores).unflatten(-1, (-1, self.rank))


def contract(cores: list[Float[Tensor, "*batch left n right"]]) -> Float[Tensor, "*batch numbers"]:
    """The numbers of a tensor train, the last digit running fastest."""
    return strung(cores).flatten(-3)


def strung(cores: list[Float[Tensor, "*batch left n right"]]) -> Float[Tensor, "*batch left numbers right"]:
    """A piece of a tensor train as one tensor."""
    joined = cores[0]
    for core in cores[1:]:
        product = joined.flatten(-3, -2) @ core.flatten(-2)
        joined = product.view(*core.shape[:-3], joined.shape[-3], -1, core.shape[-1])
    return joined


def digits_of(number: int, largest: int) -> list[int]:
    """Divisors whose product is the number, each the largest that is at most ``largest``, else the least there is."""
    found = []
    while number > 1:
        fitting = [d for d in range(2, min(largest, number) + 1) if number % d == 0]
        found.append(max(fitting) if fitting else next(d for d in range(2, number + 1) if number % d == 0))
        number //= found[-1]
    return found or [1]
