"""How much each entry of a weight matters: one score an entry, the higher the more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from finegraft.locate.site import Site
from finegraft.recipe import Select
from finegraft.registry import scores

Scores = Float[Tensor, "*batch out in"]


@dataclass(frozen=True)
class Score:
    """A score ``(site, select, rng, gradient) -> scores`` in the shape of the canonical matrix.

    Attributes:
        measure: gives the scores.
        needs_gradient: whether ``gradient`` (the sum of absolute gradients over the calibration batches) must be given.
    """

    measure: Callable[[Site, Select, torch.Generator, Any], Scores]
    needs_gradient: bool = False

    def __call__(self, site: Site, select: Select, rng: torch.Generator, gradient: Any) -> Scores:
        return self.measure(site, select, rng, gradient)


def score(name: str, *, needs_gradient: bool = False) -> Callable[[Callable[..., Scores]], Score]:
    """Decorator that registers a score under ``name``."""
    return lambda measure: scores.register(name)(Score(measure, needs_gradient))


@score("random")
def random(site: Site, select: Select, rng: torch.Generator, gradient: Any) -> Scores:
    """The same chance for every entry."""
    return torch.rand(*site.batch, site.fan_out, site.fan_in, generator=rng)


@score("magnitude")
def magnitude(site: Site, select: Select, rng: torch.Generator, gradient: Any) -> Scores:
    """``|W|``."""
    return site.weight.abs()


@score("low-rank-magnitude")
def low_rank_magnitude(site: Site, select: Select, rng: torch.Generator, gradient: Any) -> Scores:
    """``|W_r|`` for the best approximation of rank ``filter_rank`` (LIFT, Liu et al. 2025, arXiv:2506.00772)."""
    u, s, vh = torch.linalg.svd(site.weight.float(), full_matrices=False)
    rank = min(select.filter_rank, s.shape[-1])
    return ((u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]).abs()


@score("gradient", needs_gradient=True)
def gradient_size(site: Site, select: Select, rng: torch.Generator, gradient: Any) -> Scores:
    """``sum |dL/dW|`` over the calibration batches (one of SHiRA's masks, Bhardwaj et al. 2024, arXiv:2406.13175)."""
    return gradient


@score("sensitivity", needs_gradient=True)
def sensitivity(site: Site, select: Select, rng: torch.Generator, gradient: Any) -> Scores:
    """``|W| sum |dL/dW|`` (SNIP, Lee et al. 2019, arXiv:1810.02340)."""
    return site.weight.abs() * gradient
