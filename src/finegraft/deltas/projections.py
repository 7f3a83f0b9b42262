"""How the projections of an adapter are made of what trains: dense, products, trains, or of two values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from finegraft.deltas.delta import Shapes
from finegraft.deltas.tensor_train import digits_of, strung
from finegraft.inits.factors import kaiming_uniform

Start = Literal["kaiming", "zero", "houlsby", "bert"]
Get = Callable[[str], Tensor]

RULES = "rules"
"""The tensor that all Kronecker projections of a part have in common."""

_STDS = {"houlsby": 1e-2, "bert": 2e-2}
_RULES_STD = 1e-2
_DIGIT = 12
"""The largest digit of a train, where the widths have such divisors."""


class Projection(Protocol):
    """A map ``(out, in)`` made of tensors whose names begin with its own."""

    @property
    def passes_straight(self) -> bool:
        """Whether its gradient is none of its value's, but passes straight through a rounding."""
        ...

    def shapes(self, name: str, out: int, into: int) -> Shapes:
        """Shapes of its tensors."""
        ...

    def initial(self, name: str, out: int, into: int, start: Start, rng: torch.Generator) -> dict[str, Tensor]:
        """Its tensors at the start, at which a ``zero`` start makes the map zero."""
        ...

    def matrix(self, get: Get, name: str) -> Float[Tensor, "out in"]:
        """The map."""
        ...


@dataclass(frozen=True)
class Dense:
    """A matrix as it is."""

    passes_straight: ClassVar[bool] = False

    def shapes(self, name: str, out: int, into: int) -> Shapes:
        return {name: (out, into)}

    def initial(self, name: str, out: int, into: int, start: Start, rng: torch.Generator) -> dict[str, Tensor]:
        if start == "zero":
            return {}
        return {name: _drawn((out, into), start, rng)}

    def matrix(self, get: Get, name: str) -> Tensor:
        return get(name)


@dataclass(frozen=True)
class Kronecker:
    """``sum_i kron(R_i, L_i T_i)``: ``terms`` products, with rules ``R`` that are shared (PHM layers).

    Attributes:
        terms: ``n``; it divides both widths. Rules are ``(n, n, n)``.
        rank: inner width of ``L_i: (out / n, rank)`` and ``T_i: (rank, in / n)``.
    """

    terms: int
    rank: int
    passes_straight: ClassVar[bool] = False

    def shapes(self, name: str, out: int, into: int) -> Shapes:
        n = self.terms
        return {f"{name}_left": (n, out // n, self.rank), f"{name}_right": (n, self.rank, into // n)}

    def initial(self, name: str, out: int, into: int, start: Start, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(name, out, into)
        if start == "zero":
            del shapes[f"{name}_left"]
        return {tensor: _glorot(shape, rng) for tensor, shape in shapes.items()}

    def rules(self, start: Start, rng: torch.Generator) -> Tensor:
        """The rules at the start: so small in the paper that the adapter is near the identity."""
        std = 1 / self.terms if start == "zero" else _RULES_STD
        return std * torch.randn(self.terms, self.terms, self.terms, generator=rng)

    def matrix(self, get: Get, name: str) -> Tensor:
        blocks = get(f"{name}_left") @ get(f"{name}_right")
        return torch.einsum("nab,noi->aobi", get(RULES), blocks).flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class TensorTrain:
    """A tensor train over the digits of both widths (LoRETTA, Yang et al. 2024, arXiv:2402.11417).

    Attributes:
        rank: inner widths of the train.
    """

    rank: int
    passes_straight: ClassVar[bool] = False

    def shapes(self, name: str, out: int, into: int) -> Shapes:
        digits = [("out", n) for n in digits_of(out, _DIGIT)] + [("in", n) for n in digits_of(into, _DIGIT)]
        ranks = [1, *[self.rank] * (len(digits) - 1), 1]
        found: Shapes = {}
        for (side, digit), left, right in zip(digits, ranks, ranks[1:], strict=False):
            number = sum(key.startswith(f"{name}_{side}_") for key in found)
            found[f"{name}_{side}_{number}"] = (left, digit, right)
        return found

    def initial(self, name: str, out: int, into: int, start: Start, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(name, out, into)
        if start == "zero":
            del shapes[f"{name}_out_0"]
        share = _STDS.get(start, (1 / (out + into)) ** 0.5) ** (1 / len(shapes))
        return {key: torch.randn(s, generator=rng) * (share / math.sqrt(s[-1])) for key, s in shapes.items()}

    def matrix(self, get: Get, name: str) -> Tensor:
        left, right = (strung(_numbered(get, f"{name}_{side}_")) for side in ("out", "in"))
        return left.flatten(0, 1) @ right.flatten(1)


def _numbered(get: Get, prefix: str) -> list[Tensor]:
    """Tensors of this name that are numbered from zero on."""
    found: list[Tensor] = []
    try:
        while True:
            found.append(get(f"{prefix}{len(found)}"))
    except AttributeError:
        return found


@dataclass(frozen=True)
class Binary:
    """``size * sign(latent)`` with a trained size: one bit an entry in files.

    Gradients pass the sign unchanged, where the latent number is within ``[-1, 1]``.
    """

    passes_straight: ClassVar[bool] = True

    def shapes(self, name: str, out: int, into: int) -> Shapes:
        return {name: (out, into), f"{name}_size": (1,)}

    def initial(self, name: str, out: int, into: int, start: Start, rng: torch.Generator) -> dict[str, Tensor]:
        latent = _drawn((out, into), "kaiming" if start == "zero" else start, rng)
        size = latent.abs().mean().view(1)
        return {name: latent, f"{name}_size": torch.zeros_like(size) if start == "zero" else size}

    def matrix(self, get: Get, name: str) -> Tensor:
        latent = get(name)
        near = latent.clamp(-1, 1)
        return get(f"{name}_size") * (_signs(latent) + (near - near.detach()))


def to_bits(latent: Tensor) -> Tensor:
    """What a file keeps of the latent numbers of a :class:`Binary`."""
    return latent >= 0


def from_bits(bits: Tensor) -> Tensor:
    """Latent numbers that give the same map."""
    return bits.float() * 2 - 1


def _signs(latent: Tensor) -> Tensor:
    return (latent.detach() >= 0).to(latent.dtype) * 2 - 1


def _drawn(shape: tuple[int, ...], start: Start, rng: torch.Generator) -> Tensor:
    if start == "kaiming":
        return kaiming_uniform(shape, rng)
    std = _STDS[start]
    bound = 2 * std if start == "houlsby" else 1.0
    return torch.nn.init.trunc_normal_(torch.empty(shape), 0, std, -bound, bound, rng)


def _glorot(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Uniform with a gain of ``sqrt(2)``, each of a stack of matrices by itself."""
    return torch.empty(shape).uniform_(-1, 1, generator=rng) * math.sqrt(12 / (shape[-1] + shape[-2]))
