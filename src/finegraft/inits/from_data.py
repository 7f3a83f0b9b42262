"""Starts of low-rank factors that look at calibration data: inputs of the layer, or the gradient of its weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from finegraft.errors import SiteError
from finegraft.inits.decompose import Triplets, leading_triplets
from finegraft.inits.factors import Factors, dense, factor_init, split_evenly
from finegraft.locate.site import Site

_DAMPING = 0.01
"""Of the mean variance, added to the covariance so that it can be inverted."""
_GAMMA = 16.0
"""Of LoRA-GA's stable scale: the larger, the smaller the factors."""


@factor_init("corda-ipm", takes_from_weight=True, needs="covariance")
def instruction_previewed(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """The part of the weight that acts most on the inputs of calibration data, to adapt to a task like them.

    With the covariance ``C`` of inputs and ``W C = U S V^T`` the factors are ``B = U sqrt(S)`` and
    ``A = sqrt(S) V^T C^-1`` of the largest ``S`` (CorDA, Yang et al. 2024, arXiv:2406.05223).
    """
    return _oriented(site, rank, scale, least=False)


@factor_init("corda-kpm", takes_from_weight=True, needs="covariance")
def knowledge_preserved(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """The part that acts least on such inputs, to keep what the base knows of them; see ``corda-ipm``."""
    return _oriented(site, rank, scale, least=True)


@factor_init("lora-ga", takes_from_weight=True, needs="gradient")
def gradient_aligned(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """``A`` and ``B`` span singular vectors ``1..r`` and ``r+1..2r`` of the gradient (LoRA-GA, arXiv:2407.05000).

    The first step then follows the gradient in ``2 r`` directions. As in PEFT's default, ``B`` holds the singular
    values, times ``out^(1/4) / sqrt(gamma)`` with ``gamma = 16``.
    """
    if 2 * rank > min(site.fan_in, site.fan_out):
        raise SiteError(
            f"init 'lora-ga' takes two singular vectors of the gradient for each rank; {site.name!r} has "
            f"{min(site.fan_in, site.fan_out)}, fewer than twice {rank}: use a smaller rank, or leave this site out"
        )
    u, s, vh = leading_triplets(_statistic(site), 2 * rank)
    size = site.fan_out**0.25 / _GAMMA**0.5
    return vh[..., :rank, :].contiguous(), size * u[..., rank:] * s[..., None, rank:]


def first_step(site: Site, rank: int, step: float) -> Triplets:
    """The triplets nearest to the first step of Adam on the whole weight, ``-step * sign(gradient)`` (LoRA-SB).

    Args:
        site: with the gradient as its statistic.
        rank: how many.
        step: size of the step in each entry.
    """
    return leading_triplets(-step * _statistic(site).sign(), rank)


def _oriented(site: Site, rank: int, scale: float, *, least: bool) -> Factors:
    covariance = _statistic(site).double()
    variances = torch.diagonal(covariance)
    covariance = covariance + _DAMPING * variances.mean() * torch.eye(len(covariance), device=covariance.device)
    w = dense(site, "corda")
    product = w.double() @ covariance
    if least:
        u, s, vh = torch.linalg.svd(product, full_matrices=False)
        u, s, vh = u[:, -rank:], s[-rank:], vh[-rank:]
    else:
        u, s, vh = leading_triplets(product, rank)
    back = torch.cholesky_solve(vh.mT, torch.linalg.cholesky(covariance)).mT
    return split_evenly((u, s, back), scale, w.dtype)


def _statistic(site: Site) -> Float[Tensor, "*batch n in"]:
    found: Tensor = site.statistic
    if not bool(found.any()):
        raise SiteError(
            f"calibration tells nothing of {site.name!r}: no batch reaches it, or its gradient is zero everywhere. "
            "Give other batches, or leave this site out"
        )
    return found
