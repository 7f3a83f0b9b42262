"""Decompositions of a weight that come out the same for every copy of a base.

They are taken of the weight rounded to bfloat16, on the CPU: a base in float32 and its copy in bfloat16 then have the
same factors, so that files need not hold them. Whole decompositions are done in double precision. Signs are fixed too.

The leading triplets of a large matrix come from a block Krylov space (Musco & Musco 2015, arXiv:1504.05477) with a
fixed seed: singular values of trained weights to about 1e-6, those of pure noise, where they lie closest, to 1e-3.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finegraft.errors import SiteError
from finegraft.locate.site import Site

Triplets = tuple[Float[Tensor, "*batch out rank"], Float[Tensor, "*batch rank"], Float[Tensor, "*batch rank in"]]

_OVERSAMPLING, _STEPS = 8, 6
_SEED = 0
_SINGULAR = 1e-6
"""Of the largest pivot of inner products: below it their Cholesky factor has lost too many digits."""


def singular_triplets(site: Site, count: int | None = None, first: int = 0, *, exact: bool = False) -> Triplets:
    """``(U, S, V^T)`` of the weight for ``count`` singular values in falling order, from number ``first`` on.

    The entry of the largest size in each column of ``U`` is positive. The factors are orthonormal, also where few
    triplets of a large matrix are asked for and approximated.

    Args:
        site: where the weight is.
        count: how many; None for all.
        first: how many to leave out.
        exact: decompose the whole matrix whatever its size.

    Raises:
        SiteError: the weight holds whole numbers.
    """
    wanted = min(site.matrix_shape[-2:]) if count is None else first + count
    w = _shared(site)
    u, s, vh = leading_triplets(w.double() if exact or not _is_large(w, wanted) else w.float(), wanted, exact=exact)
    u, s, vh = u[..., first:].double(), s[..., first:].double(), vh[..., first:, :].double()
    signs = torch.gather(u, -2, u.abs().argmax(-2, keepdim=True)).sign()
    return u * signs, s, vh * signs.transpose(-1, -2)


def leading_triplets(w: Float[Tensor, "*batch out in"], count: int, *, exact: bool = False) -> Triplets:
    """``(U, S, V^T)`` of the ``count`` largest singular values in falling order.

    They are in the matrix's precision, or in double precision where they are approximated.

    Args:
        w: the matrix.
        count: how many, at most the smaller side.
        exact: decompose the whole matrix whatever its size.
    """
    if not exact and _is_large(w, count):
        return _leading(w, count)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u[..., :count], s[..., :count], vh[..., :count, :]


def _is_large(w: Tensor, count: int) -> bool:
    """Whether the space in which leading triplets are sought is much smaller than the matrix."""
    return 2 * (_STEPS + 1) * (count + _OVERSAMPLING) <= min(w.shape[-2:])


def ldu(site: Site, count: int) -> Triplets:
    """``(P L, D, U)``: the first ``count`` columns, pivots and rows of ``W = P L D U`` with unit triangles.

    Rows are pivoted. A pivot of zero leaves the row of ``U`` as it is.

    Args:
        site: where the weight is.
        count: how many.

    Raises:
        SiteError: the weight holds whole numbers.
    """
    w = rounded(site)
    # The first pivots are those of the first columns alone.
    factored, swaps = torch.linalg.lu_factor(w[..., :count])
    pivots = torch.diagonal(factored, dim1=-2, dim2=-1)
    lower = factored.tril(-1)
    torch.diagonal(lower, dim1=-2, dim2=-1).fill_(1)
    order = _order(swaps - 1, w.shape[-2]).unsqueeze(-1)
    top = torch.gather(w, -2, order[..., :count, :].expand(*w.shape[:-2], count, w.shape[-1]))
    upper = torch.linalg.solve_triangular(lower[..., :count, :], top, upper=False, unitriangular=True)
    divisor = torch.where(pivots == 0, 1, pivots).unsqueeze(-1)
    return torch.zeros_like(lower).scatter(-2, order.expand_as(lower), lower), pivots, upper / divisor


def _order(swaps: Int[Tensor, "*batch count"], rows: int) -> Int[Tensor, "*batch rows"]:
    """Which row stands where after these swaps, each of a row with the one that was swapped with it."""
    order = torch.arange(rows).expand(*swaps.shape[:-1], rows).clone()
    for k in range(swaps.shape[-1]):
        other = swaps[..., k : k + 1].long()
        here, there = order[..., k : k + 1].clone(), order.gather(-1, other)
        order.scatter_(-1, other, here)
        order[..., k : k + 1] = there
    return order


def check_decomposable(site: Site) -> None:
    """Raise :class:`SiteError` where the weight holds whole numbers."""
    if not site.weight.is_floating_point():
        raise SiteError(
            f"a decomposition needs a weight of fractions, but {site.name!r} holds {site.weight.dtype} numbers"
        )


def rounded(site: Site) -> Float[Tensor, "*batch out in"]:
    """The canonical matrix that all copies of a base share, in double precision."""
    return _shared(site).double()


def _shared(site: Site) -> Tensor:
    check_decomposable(site)
    return site.base_weight.bfloat16().cpu()


def _leading(w: Tensor, count: int) -> Triplets:
    rng = torch.Generator().manual_seed(_SEED)
    width = count + _OVERSAMPLING
    start = torch.randn(*w.shape[:-2], w.shape[-1], width, generator=rng, dtype=w.dtype).to(w.device)
    frame = torch.zeros(*w.shape[:-1], 0, dtype=torch.float64, device=w.device)
    images: list[Tensor] = []
    for _ in range(_STEPS + 1):
        block = (w @ (images[-1] if images else start)).double()
        for _ in range(2):  # once leaves what rounding brings back
            block = _orthonormal(block - frame @ (frame.mT @ block))
        frame = torch.cat([frame, block], dim=-1)
        images.append(w.mT @ block.to(w.dtype))
    # What is left of the matrix is narrow, and its own QR leaves a small square to decompose.
    right = torch.linalg.qr(torch.cat(images, dim=-1).double())
    u, s, vh = torch.linalg.svd(right.R.mT)
    return (frame @ u)[..., :count], s[..., :count], (vh @ right.Q.mT)[..., :count, :]


def _orthonormal(columns: Float[Tensor, "*batch n width"]) -> Float[Tensor, "*batch n width"]:
    """The same span by a Cholesky factor of inner products, many times faster than QR; by QR where that fails."""
    lower, failed = torch.linalg.cholesky_ex(columns.mT @ columns)
    pivots = torch.diagonal(lower, dim1=-2, dim2=-1)
    if bool(failed.any()) or bool((pivots.amin(-1) <= _SINGULAR * pivots.amax(-1)).any()):
        return torch.linalg.qr(columns).Q
    return torch.linalg.solve_triangular(lower.mT, columns, upper=True, left=False)
