"""Registries: filled on first use, from decorators and entry points; unknown names suggest the nearest."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from finegraft import registry
from finegraft.deltas.bias import Bias
from finegraft.errors import RecipeError
from finegraft.grafting.make import resolve
from finegraft.recipe import Recipe
from finegraft.registry import Registry, kinds, methods


@pytest.fixture
def things():
    return Registry("thing", package="finegraft.inits", group="finegraft.things")


def test_built_in_entries_come_with_the_first_look():
    assert "low-rank" in kinds
    assert "kaiming" in registry.inits
    assert "magnitude" in registry.scores
    assert list(methods) == sorted(methods)
    assert [name for name, _ in kinds.items()] == list(kinds)


def test_decorator_files_and_returns_the_entry(things):
    @things.register("one")
    def one():
        return 1

    assert things["one"] is one
    assert things.filed("one")
    things.remove("one")
    assert "one" not in things


def test_the_same_entry_may_be_filed_again_another_may_not(things):
    def made():
        def one():
            return 1

        return one

    things.register("one")(made())
    things.register("one")(made())
    with pytest.raises(RecipeError, match=r"thing 'one' is already registered by .*made\.<locals>\.one"):
        things.register("one")(len)


@pytest.mark.parametrize(
    ("wrong", "right"), [("loar", "lora"), ("LoRA", "lora"), ("houlsbi", "houlsby"), ("lift_", "lift")]
)
def test_unknown_name_suggests_the_nearest(wrong, right):
    with pytest.raises(
        RecipeError, match=rf"unknown method '{wrong}'; did you mean '{right}'\? \(known: .*adapterbias, "
    ):
        methods[wrong]


def test_a_name_like_no_other_lists_all():
    with pytest.raises(RecipeError, match=r"unknown kind 'zzz'; known: .*bias, .*bottleneck, "):
        kinds["zzz"]


def test_entry_points_of_other_packages(monkeypatch, things):
    point = EntryPoint(name="their-thing", value="finegraft.deltas.bias:Bias", group="finegraft.things")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "finegraft.things" else [])
    assert things["their-thing"] is Bias


def test_entry_points_cannot_take_a_name(monkeypatch):
    point = EntryPoint(name="taken", value="finegraft.deltas.bias:Bias", group="finegraft.things")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    things = Registry("thing", package="finegraft.inits", group="finegraft.things")
    things.register("taken")(len)
    with pytest.raises(RecipeError, match="thing 'taken' is already registered by _?builtin"):
        list(things)


def test_a_method_registered_from_outside_is_resolved_like_any_other():
    own = Recipe.parse({"name": "own", "parts": [{"where": {"type": "linear"}, "what": {"kind": "bias"}}]})
    methods.register("own")(own)
    try:
        assert resolve("own") is own
        assert resolve({"name": "own", "lr": 0.5}).train.lr == 0.5
    finally:
        methods.remove("own")
