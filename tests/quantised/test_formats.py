"""Formats for fewer bits, the decompositions that use them, and the choice among them."""

from __future__ import annotations

import itertools

import pytest
import torch

from finegraft.errors import RecipeError
from finegraft.inits.remainder import Importance, split
from finegraft.quantised.blocks import pack, unpack
from finegraft.quantised.budget import cheapest_error
from finegraft.quantised.normal_float import NormalFloat, code_points
from finegraft.quantised.tensor import QuantisedTensor
from finegraft.quantised.uniform import Uniform

FORMATS = [NormalFloat(), NormalFloat(width=3), NormalFloat(width=2, block=16), Uniform(), Uniform(width=3, block=20)]


def weight():
    return torch.randn(36, 50, generator=torch.Generator().manual_seed(0)) / 10


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_round_trips(bits):
    codes = torch.randint(0, 2**bits, (37,), generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert len(packed) == -(-37 * bits // 8)
    assert torch.equal(unpack(packed, bits, 37), codes)


@pytest.mark.parametrize("quantiser", FORMATS, ids=repr)
def test_errors_stay_within_the_bound_and_a_second_time_changes_nothing(quantiser):
    w = weight()
    held = QuantisedTensor.of(w, quantiser).dequantize()
    assert bool(((held - w).abs() <= quantiser.bound(w) + 1e-7).all())
    torch.testing.assert_close(QuantisedTensor.of(held, quantiser).dequantize(), held)


def test_the_first_normal_float_is_that_of_qlora():
    expected = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    expected += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    torch.testing.assert_close(code_points(4), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("width", "bits"), [(4, 4.127), (3, 3.127)])
def test_bits_of_double_quantisation(width, bits):
    assert abs(NormalFloat(width=width).bits({}, (64, 64)) - bits) < 5e-4


def test_zeros_stay_zeros():
    for quantiser in FORMATS:
        assert not QuantisedTensor.of(torch.zeros(4, 8), quantiser).dequantize().any()


class TestSplit:
    def error(self, w, parts, importance=None):
        a, b = parts.factors
        rest = w - parts.quantised.dequantize() - b @ a
        if importance is not None:
            rest = importance.rows.sqrt().unsqueeze(-1) * rest * importance.columns.sqrt()
        return rest.norm()

    @pytest.mark.parametrize("factors_first", [True, False])
    def test_more_steps_never_make_it_worse_and_the_error_is_what_it_says(self, factors_first):
        w, quantiser = weight(), NormalFloat(width=3)
        plain = (QuantisedTensor.of(w, quantiser).dequantize() - w).norm()
        errors = []
        for steps in (1, 2, 5, 50):
            parts = split(w, quantiser, 4, steps=steps, factors_first=factors_first)
            torch.testing.assert_close(self.error(w, parts), torch.tensor(parts.error))
            errors.append(parts.error)
        assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
        assert errors[0] < plain

    def test_equal_weights_are_none(self):
        w, quantiser = weight(), NormalFloat()
        even = split(w, quantiser, 4, importance=Importance(torch.ones(36), torch.ones(50)), steps=3)
        without = split(w, quantiser, 4, steps=3)
        torch.testing.assert_close(even.quantised.dequantize(), without.quantised.dequantize())

    def test_weights_move_the_error_to_where_it_matters_less(self):
        w, quantiser = weight(), NormalFloat(width=2)
        importance = Importance(torch.linspace(0.01, 4, 36), torch.linspace(0.01, 4, 50))
        weighed, plain = (split(w, quantiser, 4, importance=given) for given in (importance, None))
        assert self.error(w, weighed, importance) < self.error(w, plain, importance)

    def test_a_full_rank_leaves_nothing_to_quantise(self):
        parts = split(weight(), NormalFloat(), 36, steps=1)
        assert parts.error < 1e-5

    def test_the_first_step_of_loftq_is_the_best_low_rank_part_of_the_rounding(self):
        w, quantiser = weight(), NormalFloat()
        parts = split(w, quantiser, 4, steps=1, factors_first=False)
        rest = w - QuantisedTensor.of(w, quantiser).dequantize()
        torch.testing.assert_close(torch.tensor(parts.error), torch.linalg.svdvals(rest)[4:].norm())


class TestBudget:
    errors, bits = [[9.0, 4.0, 1.0], [5.0, 4.5, 0.5], [2.0, 1.0, 0.9]], [[2.0, 3.0, 4.0]] * 3

    @pytest.mark.parametrize("budget", [6, 7, 8, 9, 10, 12])
    def test_it_is_the_best_of_all_choices(self, budget):
        pytest.importorskip("scipy")
        chosen = cheapest_error(self.errors, self.bits, budget)
        every = itertools.product(range(3), repeat=3)
        within = [c for c in every if sum(self.bits[i][k] for i, k in enumerate(c)) <= budget]
        best = min(sum(self.errors[i][k] for i, k in enumerate(c)) for c in within)
        assert sum(self.errors[i][k] for i, k in enumerate(chosen)) == best
        assert sum(self.bits[i][k] for i, k in enumerate(chosen)) <= budget

    def test_too_little_says_so(self):
        with pytest.raises(RecipeError, match="a budget of 5 bits is too small: the cheapest formats take 6"):
            cheapest_error(self.errors, self.bits, 5)
