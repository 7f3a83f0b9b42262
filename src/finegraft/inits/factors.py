"""Starts of the two factors of a low-rank change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.registry import inits

Factors = tuple[Float[Tensor, "*batch rank in"], Float[Tensor, "*batch out rank"]]


@dataclass(frozen=True)
class FactorInit:
    """A start ``(site, rank, scale, rng) -> (a, b)``.

    Attributes:
        draw: gives the factors.
        takes_from_weight: whether ``scale * b @ a`` is a part of the weight, to be subtracted from the change.
    """

    draw: Callable[[Site, int, float, torch.Generator], Factors]
    takes_from_weight: bool = False

    def __call__(self, site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
        return self.draw(site, rank, scale, rng)


def factor_init(name: str, *, takes_from_weight: bool = False) -> Callable[[Callable[..., Factors]], FactorInit]:
    """Decorator that registers a start under ``name``."""
    return lambda draw: inits.register(name)(FactorInit(draw, takes_from_weight))


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
    u, s, vh = torch.linalg.svd(_dense(site, "pissa"), full_matrices=False)
    root = (s[..., :rank] / scale).sqrt()
    return root.unsqueeze(-1) * vh[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)


@factor_init("olora", takes_from_weight=True)
def olora(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """The first columns and rows of a QR decomposition (OLoRA, Büyükakyüz 2024, arXiv:2406.01775)."""
    q, r = torch.linalg.qr(_dense(site, "olora"))
    return r[..., :rank, :].contiguous(), q[..., :rank].contiguous()


def _dense(site: Site, name: str) -> Tensor:
    w = site.weight
    if not w.is_floating_point():
        raise SiteError(
            f"init {name!r} decomposes the weight, but {site.name!r} holds {w.dtype} numbers: use init: kaiming"
        )
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
