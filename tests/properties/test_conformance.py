"""The conformance suite as another package would use it: on a kind and a method of its own, sound or broken."""

from __future__ import annotations

import importlib

import pytest
import torch
from annotated_types import Ge
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from pydantic import PositiveFloat
from torch import nn

import finegraft.testing
from finegraft.deltas.delta import Delta
from finegraft.errors import MissingExtra, RecipeError, SiteError
from finegraft.recipe import Recipe
from finegraft.registry import inits, kinds, methods
from finegraft.testing import BASES, LAWS, check_kind, check_method, settings
from finegraft.testing.base_models import Classifier
from finegraft.testing.conformance import bases_for

FAST = [law for law in LAWS if not law.slow]


@pytest.fixture
def register():
    filed = []

    def file(registry, name, entry):
        registry.register(name)(entry)
        filed.append((registry, name))

    yield file
    for registry, name in filed:
        registry.remove(name)


class RowGain(Delta):
    """``diag(1 + g) W``: written with the two functions that a new kind needs."""

    kind = "row-gain"
    on = ("linear", "tensor")

    strength: PositiveFloat = 0.5

    def shapes(self, site):
        return {"gain": (*site.batch, site.fan_out)}

    def weight(self, p, w):
        return w * (1 + self.strength * p.gain.to(w.dtype).unsqueeze(-1))


class HalfRowGain(RowGain):
    """The same, with a fast path that does half of it."""

    kind = "half-row-gain"

    def forward(self, p, layer, x):
        y = layer(x)
        bias = 0 if layer.bias is None else layer.bias
        return bias + (y - bias) * (1 + self.strength / 2 * p.gain)


class RaisingGain(RowGain):
    """The same, raising an error of its own in training."""

    kind = "raising-gain"

    def weight(self, p, w):
        if p.training:
            raise ZeroDivisionError("no training today")
        return super().weight(p, w)


def test_a_sound_kind_of_another_package(register):
    register(kinds, "row-gain", RowGain)
    assert {base.site.type for base in bases_for("row-gain")} == {"linear", "tensor"}
    check_kind("row-gain", laws=FAST, examples=1)


def test_a_broken_kind_is_told_what_it_breaks(register):
    register(kinds, "half-row-gain", HalfRowGain)
    with pytest.raises(AssertionError) as error:
        check_kind("half-row-gain", bases=BASES[:1], laws=FAST)
    message = str(error.value)
    assert "kind 'half-row-gain' breaks " in message
    for law in ("forward_agrees_with_weight_in_single_precision on linear", "merging_changes_no_output on linear"):
        assert law in message
    assert "declared_counts" not in message


def test_errors_of_a_kind_are_findings(register):
    register(kinds, "raising-gain", RaisingGain)
    with pytest.raises(
        AssertionError, match="training on linear: ZeroDivisionError: no training today|no training today"
    ):
        check_kind("raising-gain", bases=BASES[:1], laws=FAST, examples=1)


def test_a_kind_that_is_not_there():
    with pytest.raises(RecipeError, match=r"unknown kind 'low-ran'; did you mean 'low-rank'\?"):
        check_kind("low-ran")


def test_bases_that_do_not_fit():
    with pytest.raises(AssertionError, match="kind 'prefix' goes on attention: none of the bases has such a site"):
        check_kind("prefix", bases=BASES[:1])


def make():
    ids = torch.randint(0, 11, (2, 5))
    return Classifier(8, 12, 2, depth=1, classes=3), {"ids": ids, "labels": torch.tensor([0, 1])}


def test_a_method_of_another_package(register):
    part = {"where": {"role": ["q", "v"]}, "what": {"kind": "low-rank", "rank": 3}}
    register(methods, "my-method", Recipe.parse({"name": "my-method", "parts": [part]}))
    check_method("my-method", make, laws=FAST, rank=2)


def test_a_method_that_fits_nothing():
    with pytest.raises(SiteError, match="role 'q' fits no site"):
        check_method("r-amt", lambda: (nn.Sequential(nn.Linear(4, 4)), {"input": torch.ones(2, 4)}), role="q")


def test_a_method_that_breaks_a_law(register, monkeypatch):
    register(kinds, "half-row-gain", HalfRowGain)
    part = {"where": {"role": "q"}, "what": {"kind": "half-row-gain"}}
    register(methods, "half", Recipe.parse({"name": "half", "parts": [part]}))
    with pytest.raises(AssertionError, match=r"(?s)method 'half' breaks .*forward_agrees_with_weight"):
        check_method("half", make, laws=FAST)


def test_a_missing_extra_is_named(monkeypatch):
    def absent(place):
        raise ModuleNotFoundError("No module named 'hypothesis'", name="hypothesis")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"check_kind needs hypothesis: .*pip install 'finegraft\[testing\]'"):
        finegraft.testing.check_kind


def test_public_names():
    assert all(getattr(finegraft.testing, name) for name in finegraft.testing.__all__)
    with pytest.raises(AttributeError, match="module 'finegraft.testing' has no attribute 'check_kinds'"):
        finegraft.testing.check_kinds


class TestDrawnSettings:
    @pytest.mark.parametrize("kind", list(kinds))
    def test_are_small_and_valid(self, kind):
        @hypothesis_settings(max_examples=20, deadline=None, derandomize=True, database=None)
        @given(settings(kinds[kind]))
        def check(delta):
            assert isinstance(delta, kinds[kind])
            fields = type(delta).model_fields.items()
            least = {name: max([4, *(b.ge for b in field.metadata if isinstance(b, Ge))]) for name, field in fields}
            assert all(value <= least[name] for name, value in delta.model_dump().items() if type(value) is int)

        check()

    @pytest.mark.parametrize(
        ("kind", "field", "values"),
        [
            ("low-rank", "init", {name for name in inits if kinds["low-rank"](init=name).needs is None}),
            ("low-rank", "train_a", {True, False}),
            ("low-rank", "rank", {1, 2, 3, 4}),
            ("low-rank", "alpha", {8.0, 16.0, 32.0}),
            ("bottleneck", "activation", {"relu", "gelu", "silu", "tanh", "glu", "identity"}),
            ("bottleneck", "dropout", {0.0, 0.0625, 0.25}),
            ("sparse", "unit", {"entry", "row", "column", "block", "head", "channel"}),
        ],
    )
    def test_reach_every_choice(self, kind, field, values):
        found = set()

        @hypothesis_settings(max_examples=200, deadline=None, derandomize=True, database=None)
        @given(settings(kinds[kind]))
        def collect(delta):
            found.add(getattr(delta, field))

        collect()
        assert found == values

    def test_leave_out_what_does_not_fit(self):
        (norm,) = [base for base in BASES if base.name == "rms-norm"]
        sides = set()

        @hypothesis_settings(max_examples=30, deadline=None, derandomize=True, database=None)
        @given(settings(kinds["scale-shift"], norm.site))
        def collect(delta):
            sides.add(delta.side)

        collect()
        assert sides == {"out"}
