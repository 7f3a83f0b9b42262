"""A matrix as a quantised part and low-rank factors (LQ-LoRA, LoftQ), and the start in those factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from finegraft.errors import SiteError
from finegraft.inits.decompose import leading_triplets
from finegraft.inits.factors import Factors, factor_init, kaiming, split_evenly
from finegraft.locate.site import Site
from finegraft.quantised.quantiser import Quantiser
from finegraft.quantised.stored import is_quantised
from finegraft.quantised.tensor import QuantisedTensor


class Importance(NamedTuple):
    """How much the loss minds errors, by rows and by columns of a matrix; products of the two weigh its entries."""

    rows: Float[Tensor, " out"]
    columns: Float[Tensor, " in"]


class Split(NamedTuple):
    """A matrix as ``Q + B A``.

    Attributes:
        quantised: ``Q``.
        factors: ``A`` and ``B``.
        error: the weighted Frobenius norm of what is left.
    """

    quantised: QuantisedTensor
    factors: Factors
    error: float


def split(
    w: Float[Tensor, "out in"],
    quantiser: Quantiser,
    rank: int,
    *,
    importance: Importance | None = None,
    steps: int = 100,
    factors_first: bool = True,
) -> Split:
    """The best of the iterates that take the factors of ``W - Q`` and the codes of ``W - B A`` by turns.

    It ends when the error no longer falls. LQ-LoRA (Guo et al. 2023, arXiv:2311.12023) begins with the factors and
    weighs by the square root of Fisher information; LoftQ (Li et al. 2023, arXiv:2310.08659) begins with the codes.

    Args:
        w: the matrix.
        quantiser: the format of ``Q``.
        rank: of the factors.
        importance: weights of errors; None for equal ones.
        steps: the most iterations.
        factors_first: whether ``Q`` starts at zero, rather than as the matrix quantised.
    """
    wide = w.detach().float()
    weights = None if importance is None else (importance.rows.sqrt().float(), importance.columns.sqrt().float())

    def left(q: Tensor, a: Tensor, b: Tensor) -> float:
        rest = wide - q - b @ a
        return float(torch.linalg.matrix_norm(rest if weights is None else _weighed(rest, *weights)))

    best: Split | None = None
    held = None if factors_first else QuantisedTensor.of(wide, quantiser)
    for _ in range(steps):
        a, b = _factors(wide if held is None else wide - held.dequantize(), rank, weights)
        again = QuantisedTensor.of(wide - b @ a, quantiser)
        held = again if factors_first or held is None else held
        error = left(held.dequantize(), a, b)
        if best is not None and error >= best.error:
            return best
        best = Split(QuantisedTensor(held.codes, quantiser, w.shape, w.dtype, (a, b)), (a, b), error)
        held = again
    if best is None:
        raise ValueError(f"splitting a matrix takes at least one step, not {steps}")
    return best


def _factors(rest: Tensor, rank: int, weights: tuple[Tensor, Tensor] | None) -> Factors:
    if weights is None:
        return split_evenly(leading_triplets(rest, rank), 1.0, rest.dtype)
    a, b = split_evenly(leading_triplets(_weighed(rest, *weights), rank), 1.0, rest.dtype)
    rows, columns = (weight.clamp_min(torch.finfo(weight.dtype).tiny) for weight in weights)
    return a / columns, b / rows.unsqueeze(-1)


def _weighed(rest: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return rows.unsqueeze(-1) * rest * columns


@factor_init("quantisation-error", moves=True)
def quantisation_error(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """The factors that the base's quantisation left out, so that the start is as near to the dense base as they get.

    Where the base is not quantised nothing was left out, and the start is LoRA's.

    Raises:
        SiteError: the base was quantised without such factors, or with ones of another rank.
    """
    if not is_quantised(site.parameter):
        return kaiming(site, rank, scale, rng)
    left_out = getattr(site.parameter, "left_out", None)
    if left_out is None or len(left_out[0]) != rank:
        found = "none" if left_out is None else f"ones of rank {len(left_out[0])}"
        raise SiteError(
            f"init 'quantisation-error' takes factors of rank {rank} that the quantisation of {site.name!r} left out; "
            f"it left out {found}: quantise the base by fg.quantise(model, ..., rank={rank})"
        )
    a, b = left_out
    return a / scale**0.5, b / scale**0.5
