"""Leading triplets of large matrices, against whole decompositions."""

from __future__ import annotations

import pytest
import torch

from finegraft.inits.decompose import leading_triplets

RANK = 8


def matrix(decay, out=320, inner=256):
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, inner, generator=rng)).Q for n in (out, inner))
    return left * (torch.arange(inner) + 1.0).pow(-decay) @ right.T


@pytest.mark.parametrize(("decay", "tolerance"), [(0.3, 1e-6), (1.0, 1e-6)])
@pytest.mark.parametrize("wide", [False, True])
def test_they_are_those_of_a_whole_decomposition(decay, tolerance, wide):
    w = matrix(decay).T if wide else matrix(decay)
    u, s, vh = leading_triplets(w, RANK)
    _, values, _ = leading_triplets(w.double(), RANK, exact=True)
    torch.testing.assert_close(s, values, rtol=tolerance, atol=0)
    torch.testing.assert_close(u.T @ u, torch.eye(RANK).double())
    torch.testing.assert_close(vh @ vh.T, torch.eye(RANK).double())
    left = torch.linalg.matrix_norm(w - (u * s @ vh))
    torch.testing.assert_close(left, torch.linalg.svdvals(w.double())[RANK:].norm(), rtol=1e-5, atol=0)


def test_of_pure_noise_they_hold_nearly_as_much():
    w = torch.randn(320, 256, generator=torch.Generator().manual_seed(0))
    _, s, _ = leading_triplets(w, RANK)
    torch.testing.assert_close(s, torch.linalg.svdvals(w.double())[:RANK], rtol=2e-3, atol=0)


def test_they_are_the_same_each_time_and_one_by_one_in_a_stack():
    stack = torch.stack([matrix(0.5), matrix(0.2)])
    u, s, vh = leading_triplets(stack, RANK)
    assert torch.equal(u, leading_triplets(stack, RANK)[0])
    for i, one in enumerate(stack):
        alone = leading_triplets(one, RANK)
        torch.testing.assert_close(u[i] * s[i] @ vh[i], alone[0] * alone[1] @ alone[2], atol=1e-5, rtol=1e-4)


def test_a_matrix_of_a_lower_rank_has_zeros_left():
    w = matrix(0.5)[:, :3] @ torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    u, s, vh = leading_triplets(w, RANK)
    assert s[3:].max() < 1e-4 * s[0]
    torch.testing.assert_close(u.T @ u, torch.eye(RANK).double())
    torch.testing.assert_close((u * s @ vh).float(), w, atol=1e-4, rtol=1e-4)
