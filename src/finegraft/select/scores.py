"""How much each entry of a weight matters: one score an entry, the higher the more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.recipe import Select
from finegraft.registry import scores
from finegraft.select.low_rank import low_rank_part

Scores = Float[Tensor, "*batch out in"]
Need = Literal["absolute", "signed", "square", "inputs"]


def _as_it_is(sums: Tensor) -> Tensor:
    return sums


@dataclass(frozen=True)
class Score:
    """A score ``(site, select, rng, statistic) -> scores`` in the shape of the canonical matrix.

    The score of a larger unit is the sum over its entries.

    Attributes:
        measure: gives the scores.
        needs: the statistic it is given, summed over the calibration batches: of the loss's gradient ``g`` with respect
            to each entry ``absolute`` (``|g|``), ``signed`` (``g``) or ``square`` (``g**2``), in the shape of the
            matrix; or ``inputs``, the squares of what each column reads, ``(in,)``. None where weights are enough.
        additive: whether the scores of several batches may be added, so that units need no statistic of each entry.
        of_sums: what becomes of the sums over units.
    """

    measure: Callable[[Site, Select, torch.Generator, Any], Scores]
    needs: Need | None = None
    additive: bool = True
    of_sums: Callable[[Tensor], Tensor] = _as_it_is

    def __call__(self, site: Site, select: Select, rng: torch.Generator, statistic: Any = None) -> Scores:
        return self.measure(site, select, rng, statistic)

    @property
    def needs_gradient(self) -> bool:
        """Whether it looks at gradients, so that batches must hold labels."""
        return self.needs not in (None, "inputs")


def score(
    name: str,
    *,
    needs: Need | None = None,
    additive: bool = True,
    of_sums: Callable[[Tensor], Tensor] = _as_it_is,
) -> Callable[[Callable[..., Scores]], Score]:
    """Decorator that registers a score under ``name``; the settings are those of :class:`Score`."""
    return lambda measure: scores.register(name)(Score(measure, needs, additive, of_sums))


@score("random")
def random(site: Site, select: Select, rng: torch.Generator, statistic: Any = None) -> Scores:
    """The same chance for every unit; drawn without looking at scores (see ``select/drawing.py``)."""
    return torch.rand(*site.batch, site.fan_out, site.fan_in, generator=rng)


@score("magnitude")
def magnitude(site: Site, select: Select, rng: torch.Generator, statistic: Any = None) -> Scores:
    """``|W|``."""
    return site.weight.abs()


@score("low-rank-magnitude")
def low_rank_magnitude(site: Site, select: Select, rng: torch.Generator, statistic: Any = None) -> Scores:
    """``|W_r|`` for the best approximation of rank ``filter_rank`` (LIFT, Liu et al. 2025, arXiv:2506.00772)."""
    if not bool(site.weight.isfinite().all()):
        raise SiteError(f"the weight of {site.name!r} is not finite everywhere, so it has no part of low rank")
    return low_rank_part(site.weight, select.filter_rank, rng).abs()


@score("gradient", needs="absolute")
def gradient_size(site: Site, select: Select, rng: torch.Generator, statistic: Any) -> Scores:
    """``sum |dL/dW|`` over the batches (one of SHiRA's masks, Bhardwaj et al. 2024, arXiv:2406.13175)."""
    return statistic


@score("gradient-sum", needs="signed", additive=False)
def gradient_sum(site: Site, select: Select, rng: torch.Generator, statistic: Any) -> Scores:
    """``|sum dL/dW|``: what batches agree on (SMT's ``abs_mean``, He et al. 2024, arXiv:2405.15525)."""
    return statistic.abs()


@score("gradient-mean", needs="signed", of_sums=torch.abs)
def gradient_mean(site: Site, select: Select, rng: torch.Generator, statistic: Any) -> Scores:
    """``|sum over the unit of sum dL/dW|``: what a unit's entries agree on too (SMT's ``mean_abs``)."""
    return statistic


@score("sensitivity", needs="absolute")
def sensitivity(site: Site, select: Select, rng: torch.Generator, statistic: Any) -> Scores:
    """``|W| sum |dL/dW|`` (SNIP, Lee et al. 2019, arXiv:1810.02340)."""
    return site.weight.abs() * statistic


@score("fisher", needs="square")
def fisher(site: Site, select: Select, rng: torch.Generator, statistic: Any) -> Scores:
    """``sum (dL/dW)**2``: the empirical Fisher information by batches (SPT, He et al. 2023, arXiv:2303.08566)."""
    return statistic


@score("movement", needs="signed")
def movement(site: Site, select: Select, rng: torch.Generator, statistic: Any) -> Scores:
    """``-W sum dL/dW``: high where a step drives the weight away from zero (Sanh et al. 2020, arXiv:2005.07683)."""
    return -site.weight * statistic


@score("activation", needs="inputs")
def activation(site: Site, select: Select, rng: torch.Generator, statistic: Any) -> Scores:
    """``|W| ||x||`` with the norm of what the entry's column reads (Wanda, Sun et al. 2024, arXiv:2306.11695)."""
    return site.weight.abs() * statistic.sqrt()


@score("inputs", needs="inputs")
def inputs(site: Site, select: Select, rng: torch.Generator, statistic: Any) -> Scores:
    """``||x||`` of what the entry's column reads, whatever its weight."""
    return statistic.sqrt().expand(site.matrix_shape)
