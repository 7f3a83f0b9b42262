"""What the papers say of each structured kind: its algebra and its spectrum."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finegraft.deltas.monarch import dense, multiply, project
from finegraft.deltas.orthogonal import cayley, skew
from finegraft.deltas.tensor_train import contract, digits_of
from finegraft.inits.decompose import ldu, rounded, singular_triplets
from finegraft.locate.site import Site
from finegraft.registry import inits, kinds
from tests.deltas.structured import IN, OUT, changed, close, site_of, small_linear, trained


@pytest.fixture
def linear() -> Site:
    return small_linear()


def test_zeros_of_a_weight_stay_zero_under_a_gain(linear):
    linear.module.weight.data[2:5] = 0
    w = changed("low-rank-gain", linear)
    assert not w[2:5].any()
    delta = kinds["low-rank-gain"]()
    p = trained(delta, linear)
    close(delta.weight(p, 3 * linear.weight), 3 * delta.weight(p, linear.weight))


@pytest.mark.parametrize(
    "settings",
    [
        ("householder", {"reflections": 4}),
        ("orthogonal", {"block": 4}),
        ("orthogonal", {"block": 8, "share": True}),
        ("orthogonal", {"block": 4, "factors": 2}),
        ("givens", {}),
    ],
    ids=str,
)
def test_rotations_keep_the_gram_matrix_of_the_rows(settings, linear):
    kind, fields = settings
    w = changed(kind, linear, **fields)
    close(w @ w.t(), linear.weight @ linear.weight.t())
    assert (w - linear.weight).abs().max() > 0.01


def test_a_chain_of_reflections_is_the_product_of_its_reflections(linear):
    delta = kinds["householder"](reflections=4)
    p = trained(delta, linear)
    product = torch.eye(IN, dtype=torch.float64)
    for u in p.vectors:
        product = product @ (torch.eye(IN) - 2 * torch.outer(u, u) / (u @ u))
    close(delta.weight(p, linear.weight), linear.weight @ product)
    assert torch.linalg.matrix_rank(product - torch.eye(IN)) == 4
    close(torch.linalg.det(product), torch.tensor(1.0).double())


def test_the_cayley_form_turns(linear):
    k = skew(torch.randn(2, 10, dtype=torch.float64), 5)
    close(k, -k.transpose(-1, -2))
    assert torch.equal(k[0, 0, 1:] != 0, torch.ones(4, dtype=torch.bool))
    r = cayley(k)
    close(r @ r.transpose(-1, -2), torch.eye(5, dtype=torch.float64).expand(2, 5, 5))


def test_butterfly_factors_take_every_input_to_every_other():
    site = site_of(nn.Linear(16, 3, bias=False).double())
    delta = kinds["orthogonal"](block=4, factors=3)
    turned = delta.turn(trained(delta, site), torch.eye(16, dtype=torch.float64))
    assert bool((turned.abs() > 1e-9).all())


@pytest.mark.parametrize("width", [2, 7, 16, 24])
def test_a_tournament_has_one_rotation_less_than_inputs(width):
    site = site_of(nn.Linear(width, 3, bias=False).double())
    delta = kinds["givens"]()
    p = trained(delta, site)
    assert p.angles.shape == (width - 1,)
    expected = torch.eye(width, dtype=torch.float64)
    number = 0
    step = 1
    while step < width:
        for i in range(0, width - step, 2 * step):
            angle = math.pi * torch.tanh(p.angles[number])
            turn = torch.eye(width, dtype=torch.float64)
            turn[i, i] = turn[i + step, i + step] = angle.cos()
            turn[i, i + step], turn[i + step, i] = -angle.sin(), angle.sin()
            expected, number = expected @ turn, number + 1
        step *= 2
    close(delta.turn(p, torch.eye(width, dtype=torch.float64)), expected)


def test_a_kronecker_change_is_torchs_and_its_rank_the_product(linear):
    delta = kinds["kronecker"](rows=4, columns=6, scale=0.5)
    p = trained(delta, linear)
    close(delta.change(p), 0.5 * torch.kron(p.a, p.b))
    x = torch.randn(5, 3, IN, dtype=torch.float64)
    close(delta.act(p, x), x @ delta.change(p).t())
    p.a = torch.outer(p.a[:, 0], p.a[0])
    assert torch.linalg.matrix_rank(delta.change(p)) == torch.linalg.matrix_rank(p.b)


def test_a_circulant_is_diagonal_in_the_fourier_basis_and_of_full_rank():
    site = site_of(nn.Linear(12, 12, bias=False).double())
    delta = kinds["circulant"](divide=False)
    change = delta.change(trained(delta, site))
    basis = torch.fft.fft(torch.eye(12, dtype=torch.complex128), norm="ortho")
    spectrum = basis @ change.to(basis.dtype) @ basis.conj().t()
    close((spectrum - torch.diag(spectrum.diagonal())).abs(), torch.zeros(12, 12).double())
    assert torch.linalg.matrix_rank(change) == 12
    assert delta.count(site) == 12


@pytest.mark.parametrize("structure", ["circulant", "toeplitz"])
def test_a_change_of_low_displacement_rank_is_a_sum_of_toeplitz_products(structure):
    site = site_of(nn.Linear(10, 10, bias=False).double())
    delta = kinds["displacement"](structure=structure, terms=2)
    p = trained(delta, site)
    apart = torch.arange(10) - torch.arange(10).unsqueeze(-1)
    expected = torch.zeros(10, 10, dtype=torch.float64)
    for left, right in zip(p.left[0, 0], p.right[0, 0], strict=True):
        if structure == "toeplitz":
            expected += left[apart.abs()] @ right[apart.abs()]
        else:
            expected += left[apart % 10] @ (right[apart % 10] * torch.where(apart < 0, -1, 1))
    close(delta.change(p), expected / 10)
    if structure == "circulant":
        up, down = torch.roll(torch.eye(10).double(), 1, 0), torch.roll(torch.eye(10).double(), 1, 0)
        down[0, -1] = -1
        moved = expected - torch.linalg.inv(up) @ expected @ down
        assert torch.linalg.matrix_rank(moved, rtol=1e-9) <= 2 * 2


def test_projection_recovers_a_monarch_matrix_and_its_error_is_what_is_discarded():
    torch.manual_seed(0)
    first, second = torch.randn(3, 4, 4).double(), torch.randn(4, 3, 3).double()
    exact = dense(first, second)
    close(multiply(first, second, torch.eye(12).double()).t(), exact)
    close(dense(*project(exact, 3)), exact, 1e-12)
    other = torch.randn(12, 12).double()
    tiles = other.unflatten(0, (3, 4)).unflatten(-1, (3, 4)).permute(1, 2, 0, 3)
    discarded = torch.linalg.svdvals(tiles)[..., 1:].square().sum()
    close((dense(*project(other, 3)) - other).square().sum(), discarded)
    with pytest.raises(ValueError, match="whole tiles"):
        project(other, 5)


def test_the_fourier_matrix_is_a_monarch_matrix():
    """With its columns reordered, the unitary DFT is found without error, real and imaginary part joined."""
    basis = torch.fft.fft(torch.eye(16, dtype=torch.complex128), norm="ortho")
    reordered = basis.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2)
    tiles = reordered.unflatten(0, (4, 4)).unflatten(-1, (4, 4)).permute(1, 2, 0, 3)
    assert torch.linalg.svdvals(tiles)[..., 1:].abs().max() < 1e-12


def test_singular_triplets_are_orthonormal_signed_and_found_fast(linear):
    u, s, vh = singular_triplets(linear)
    close(u * s @ vh, linear.weight)
    assert torch.equal(torch.gather(u, 0, u.abs().argmax(0, keepdim=True)) > 0, torch.ones(1, OUT, dtype=torch.bool))
    layer = nn.Linear(200, 300, bias=False)
    u, _, vh = torch.linalg.svd(layer.weight.data, full_matrices=False)
    layer.weight.data = u / torch.arange(1, 201) @ vh
    large = site_of(layer)
    whole, few = singular_triplets(large), singular_triplets(large, 4)
    close(few[0].t() @ few[0], torch.eye(4).double())
    close(few[2] @ few[2].t(), torch.eye(4).double())
    close(few[1], whole[1][:4], 1e-4)
    close(few[0] * few[1] @ few[2], whole[0][:, :4] * whole[1][:4] @ whole[2][:4], 1e-3)


def test_copies_of_a_base_in_other_precisions_have_the_same_factors(linear):
    single, half = (site_of(nn.Linear(IN, OUT, bias=False).to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    half.module.weight.data = single.module.weight.data.bfloat16()
    for fine, coarse in zip(singular_triplets(single, 3), singular_triplets(half, 3), strict=True):
        assert torch.equal(fine, coarse)


def test_ldu_gives_the_weight_back(linear):
    lower, pivots, upper = ldu(linear, OUT)
    close(lower * pivots @ upper, linear.weight)
    close(upper.diagonal(), torch.ones(OUT).double())
    p, expected, whole = torch.linalg.lu(linear.weight)
    for count in (1, 5, OUT):
        lower, pivots, upper = ldu(linear, count)
        close(lower, (p @ expected)[:, :count])
        close(pivots.unsqueeze(-1) * upper, whole[:count])


def test_the_minor_start_is_the_end_of_the_spectrum(linear):
    a, b = inits["minor"](linear, 3, 2.0, torch.Generator())
    u, s, vh = torch.linalg.svd(linear.weight)
    close(2 * b @ a, u[:, -3:] * s[-3:] @ vh[OUT - 3 : OUT])


def test_a_core_takes_the_projection_of_the_gradient(linear):
    delta = kinds["core"](rank=4, alpha=4.0, factors_from="seed")
    p = trained(delta, linear)
    close(p.a @ p.a.t(), torch.eye(4).double())
    close(p.b.t() @ p.b, torch.eye(4).double())
    p.core.requires_grad_()
    g = torch.randn(OUT, IN).double()
    (delta.weight(p, linear.weight) * g).sum().backward()
    close(p.core.grad, p.b.t() @ g @ p.a.t())


def test_the_plain_spectral_form_changes_singular_values_alone(linear):
    u, s, vh = torch.linalg.svd(linear.weight, full_matrices=False)
    inner = u.t() @ changed("spectral", linear) @ vh.t()
    close(inner - torch.diag(inner.diagonal()), torch.zeros(OUT, OUT).double())
    assert (inner.diagonal() - s).abs().max() > 0.01


def test_spectral_rotation_keeps_singular_values(linear):
    w = changed("singular-rotation", linear, rank=5)
    close(torch.linalg.svdvals(w), torch.linalg.svdvals(linear.weight))
    assert (w - linear.weight).abs().max() > 0.01


def test_windows_of_the_spectrum_do_not_meet(linear):
    changes = [changed("singular-rotation", linear, rank=4, first=first) - linear.weight for first in (0, 4)]
    assert abs(float((changes[0] * changes[1]).sum())) < 1e-10 * float(changes[0].norm() * changes[1].norm())


def test_additive_spectral_changes_have_twice_the_rank(linear):
    change = changed("triplets", linear, rank=3, train="vectors") - linear.weight
    assert torch.linalg.matrix_rank(change, rtol=1e-9) == 6
    delta = kinds["triplets"](rank=3, train="vectors")
    p = trained(delta, linear)
    expected = (p.u + p.a) * p.s @ (p.v + p.c) - p.u * p.s @ p.v
    close(delta.weight(p, linear.weight) - linear.weight, expected)


def test_trained_pivots_and_scale_replace_the_part_that_they_come_from(linear):
    delta = kinds["triplets"](rank=5, basis="ldu", train="values", learned_scale=True)
    p = trained(delta, linear)
    residual = rounded(linear) - p.u * p.s @ p.v
    close(delta.weight(p, linear.weight), residual + (1 + p.scale) * (p.u * (p.s + p.values) @ p.v))


def test_frequencies_are_the_inverse_transform(linear):
    delta = kinds["fourier"](frequencies=20, scale=2.0)
    p = trained(delta, linear)
    spectrum = torch.zeros(OUT * IN).double()
    spectrum[p.places] = p.spectrum
    change = delta.weight(p, linear.weight) - linear.weight
    close(change, 2 * torch.fft.ifft2(spectrum.view(OUT, IN)).real)
    assert len(p.places.unique()) == 20


def test_a_kernel_gets_a_core_of_its_own_axes():
    site = site_of(nn.Conv2d(6, 8, (3, 2), bias=False).double())
    delta = kinds["tucker"](rank=3)
    assert delta.count(site) == 3 * 3 * 3 * 2 + 8 * 3 + 6 * 3 + 3 * 3 + 2 * 2
    p = trained(delta, site)
    expected = torch.einsum("abcd,oa,ib,kc,ld->oikl", p.core, p.axis_0, p.axis_1, p.axis_2, p.axis_3)
    change = (delta.weight(p, site.weight) - site.weight).view(site.shape)
    close(change, delta.scale * expected)
    for axis in range(4):
        unfolded = change.movedim(axis, 0).flatten(1)
        assert torch.linalg.matrix_rank(unfolded, rtol=1e-9) <= 3


def test_a_tensor_train_is_its_contraction():
    torch.manual_seed(0)
    cores = [torch.randn(1, 2, 3), torch.randn(3, 4, 2), torch.randn(2, 5, 1)]
    expected = torch.einsum("aib,bjc,ckd->ijk", *cores).flatten()
    close(contract(cores), expected, 1e-5)
    vectors = [torch.randn(1, n, 1) for n in (2, 3)]
    close(contract(vectors), torch.outer(vectors[0].flatten(), vectors[1].flatten()).flatten(), 1e-6)
    assert digits_of(768, 12) == [12, 8, 8]
    assert digits_of(13, 12) == [13]


def test_frozen_random_factors_follow_from_the_seed_and_the_sizes(linear):
    other = replace(linear, name="another")
    delta = kinds["random-basis"](rank=3)
    one, two, third = delta.working(linear), delta.working(other), kinds["random-basis"](rank=3, seed=1).working(linear)
    assert torch.equal(one["a"], two["a"])
    assert not torch.equal(one["a"], third["a"])


def test_a_random_sum_reaches_full_rank_on_either_side():
    for layer in (nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False)):
        site = site_of(layer.double())
        delta = kinds["random-sum"](rank=5, alpha=5.0)
        p = trained(delta, site)
        assert delta.count(site) == 5 * 3 + 3 * 12
        change = delta.weight(p, site.weight) - site.weight
        assert torch.linalg.matrix_rank(change) == 12
        terms = torch.einsum("kt,kj,tj->ktj", p.values, p.a, p.gains).flatten(0, 1)
        close(change, p.into_out @ terms if layer.in_features == 12 else (p.from_in.t() @ terms).t())


def test_blocks_of_low_rank_add_their_ranks_up_for_the_numbers_of_one(linear):
    delta = kinds["block-low-rank"](blocks=4, rank=2, alpha=2.0)
    p = trained(delta, linear)
    assert delta.count(linear) == kinds["low-rank"](rank=2).count(linear)
    a, b = delta.factors(p)
    close(b @ a, torch.block_diag(*(p.b @ p.a)))
    assert torch.linalg.matrix_rank(b @ a) == 4 * 2


@pytest.mark.parametrize("rescale", [False, True])
def test_the_mean_over_what_is_dropped_is_the_weight(rescale, linear):
    delta = kinds["dropped-low-rank"](rank=2, share=0.25, rescale=rescale)
    p = trained(delta, linear)
    p.training = True
    x = torch.eye(IN, dtype=torch.float64)
    call = SimpleLayer(linear.op, linear.module, linear.weight)
    torch.manual_seed(0)
    mean = sum(delta.forward(p, call, x) for _ in range(4000)) / 4000
    expected = delta.weight(p, linear.weight)
    plain = kinds["low-rank"](rank=2).weight(p, linear.weight) - linear.weight
    close(expected - linear.weight, plain * (1 if rescale else 0.75**2))
    close(mean.t(), expected, 0.1)


class SimpleLayer:
    """A linear layer without a bias, as a change sees it."""

    def __init__(self, op: Any, module: nn.Module, weight: Tensor) -> None:
        self.op, self.module, self.weight = op, module, weight

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def test_a_map_of_the_output_multiplies_from_the_left(linear):
    delta = kinds["output-low-rank"](rank=2)
    p = trained(delta, linear)
    close(delta.weight(p, linear.weight), (torch.eye(OUT) + p.b @ p.a) @ linear.weight)


def test_companding_is_odd_bounded_and_increasing(linear):
    delta = kinds["compander"](reach=2.0)
    p = trained(delta, linear, size=5.0)
    w = delta.weight(p, linear.weight)
    assert w.abs().max() < 2 * linear.weight.abs().max() * (1 + 1e-9)
    mirrored = SimpleNamespace(op=p.op, size=p.size, values=-p.values)
    close(delta.weight(mirrored, -linear.weight), -w)
    higher = SimpleNamespace(op=p.op, size=p.size, values=p.values + 0.1)
    assert bool((delta.weight(higher, linear.weight) > w).all())
