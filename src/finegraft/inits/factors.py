"""Starts of the two factors of a low-rank change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finegraft.errors import SiteError
from finegraft.inits.decompose import Triplets, leading_triplets
from finegraft.locate.site import Site
from finegraft.registry import inits

Factors = tuple[Float[Tensor, "*batch rank in"], Float[Tensor, "*batch out rank"]]


@dataclass(frozen=True)
class FactorInit:
    """A start ``(site, rank, scale, rng) -> (a, b)``.

    Attributes:
        draw: gives the factors.
        takes_from_weight: whether ``scale * b @ a`` is not to count at the start, and so is subtracted from the change:
            a part of the weight, in most cases.
        needs: the statistic of calibration batches that it looks at, as ``site.statistic``; see
            :attr:`finegraft.deltas.delta.Delta.needs`.
        moves: whether a fresh change can be another function than the base.
    """

    draw: Callable[[Site, int, float, torch.Generator], Factors]
    takes_from_weight: bool = False
    needs: Literal["covariance", "gradient"] | None = None
    moves: bool = False

    def __call__(self, site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
        return self.draw(site, rank, scale, rng)


def factor_init(
    name: str,
    *,
    takes_from_weight: bool = False,
    needs: Literal["covariance", "gradient"] | None = None,
    moves: bool = False,
) -> Callable[[Callable[..., Factors]], FactorInit]:
    """Decorator that registers a start under ``name``; see :class:`FactorInit`."""
    return lambda draw: inits.register(name)(FactorInit(draw, takes_from_weight, needs, moves))


def kaiming_uniform(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Uniform in ``+-1/sqrt(in)``, the start of ``nn.Linear``."""
    return torch.empty(shape).uniform_(-1, 1, generator=rng) / math.sqrt(shape[-1])


def _with_zero_b(a: Tensor, site: Site, rank: int) -> Factors:
    return a, torch.zeros(*site.batch, site.fan_out, rank)


@factor_init("kaiming")
def kaiming(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """LoRA's start: A as ``nn.Linear`` starts, B zero."""
    return _with_zero_b(kaiming_uniform((*site.batch, rank, site.fan_in), rng), site, rank)


@factor_init("gaussian")
def gaussian(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """A normal with deviation ``1/rank``, B zero."""
    return _with_zero_b(torch.randn(*site.batch, rank, site.fan_in, generator=rng) / rank, site, rank)


@factor_init("orthonormal")
def orthonormal(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """A with orthonormal rows, B zero (Zhu et al. 2024, arXiv:2402.16842)."""
    q, _ = torch.linalg.qr(torch.randn(*site.batch, site.fan_in, rank, generator=rng))
    return _with_zero_b(q.transpose(-1, -2).contiguous(), site, rank)


@factor_init("pissa", takes_from_weight=True)
def pissa(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """The principal singular triplets, their values split evenly (PiSSA, Meng et al. 2024, arXiv:2404.02948)."""
    w = dense(site, "pissa")
    return split_evenly(leading_triplets(w, rank), scale, w.dtype)


@factor_init("pissa-exact", takes_from_weight=True)
def pissa_exact(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """The same by a decomposition of the whole matrix, whatever its size."""
    w = dense(site, "pissa-exact")
    return split_evenly(leading_triplets(w, rank, exact=True), scale, w.dtype)


@factor_init("olora", takes_from_weight=True)
def olora(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """The first columns and rows of a QR decomposition (OLoRA, Büyükakyüz 2024, arXiv:2406.01775)."""
    w = dense(site, "olora")
    # The first columns of Q, and with them the first rows of R, follow from the first columns of the matrix alone.
    q, _ = torch.linalg.qr(w[..., :rank])
    return q.mT @ w, q.contiguous()


def split_evenly(triplets: Triplets, scale: float, dtype: torch.dtype) -> Factors:
    """``A = sqrt(S / scale) V^T`` and ``B = U sqrt(S / scale)``, in a precision."""
    u, s, vh = triplets
    root = (s / scale).sqrt()
    return (root.unsqueeze(-1) * vh).to(dtype), (u * root.unsqueeze(-2)).to(dtype)


def dense(site: Site, name: str) -> Tensor:
    """The base's own matrix in single precision, or in double where it is.

    Args:
        site: where.
        name: of the init, for the error.

    Raises:
        SiteError: the weight holds whole numbers.
    """
    w = site.base_weight
    if not w.is_floating_point():
        raise SiteError(
            f"init {name!r} decomposes the weight, but {site.name!r} holds {w.dtype} numbers: use init: kaiming"
        )
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
