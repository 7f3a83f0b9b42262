"""What a hyper-network gives a kind to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

HEAD, KERNEL, OWN = "_head", "_kernel", "_own"
"""What the names of tensors end in that generate a tensor, widen it, or add to it."""

RETRIEVER = ("retriever_inner", "retriever_inner_bias", "retriever_outer", "retriever_outer_bias")


class Generated:
    """The tensors that a kind reads at one site, generated as it asks for them; the rest is the site's own.

    Args:
        p: the tensors of the hyper-network at the site.
        make: generates a tensor by its name.
    """

    def __init__(self, p: Any, make: Callable[[str], Tensor]) -> None:
        self._p, self._make = p, make
        self._made: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        if getattr(self._p, f"{name}{HEAD}", None) is None:
            return getattr(self._p, name)
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]


def kernel_start(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Kernels keep the size of what they widen, and start as one where they widen nothing."""
    return torch.randn(shape, generator=rng) if max(shape) > 1 else torch.ones(shape)


def invariant(z: Float[Tensor, " n"]) -> Float[Tensor, " 2n"]:
    """Numbers as points of a circle, a quarter turn from 0 to 1: a vector of constant length."""
    return torch.cat([torch.cos(math.pi / 2 * z), torch.sin(math.pi / 2 * z)])
