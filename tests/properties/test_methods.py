"""Every law for every method of the catalogue on transformers, and a trial of every method on the whole zoo."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from finegraft.errors import RecipeError, SiteError
from finegraft.grafting.make import graft, resolve
from finegraft.recipe import Recipe
from finegraft.registry import methods
from finegraft.testing.bits import snapshot, unchanged
from finegraft.testing.case import Case, close, identical, outputs, says
from finegraft.testing.laws import LAWS
from tests.models import zoo
from tests.properties.zoo_bases import labelled, zoo_base

SHAPES = ("bert", "llama", "vit")


CASES = [(method, SHAPES[i % 3]) for i, method in enumerate(methods)]
COMPILED = {("lora", "llama"), ("dora", "bert"), ("s2ft", "llama"), ("pfeiffer", "bert"), ("lift", "vit")}
"""Methods that are compiled here; kinds are compiled one by one elsewhere."""

FAST = [law for law in LAWS if not law.slow]
IN_DOUBLE = {"gradients_are_derivatives", "gradients_in_training_are_derivatives"}
"""Llama's norms compute in float32 whatever the model's precision, so differences are too coarse for a derivative."""
SLOW = [law for law in LAWS if law.slow]


def small(method: str) -> Recipe:
    """The method with a rank, and a length of prompts, that fit a small model."""
    fields = {name for part in methods[method].parts for delta in part.what for name in type(delta).model_fields}
    cut = {"rank": 2} if "rank" in fields and method != "adapterbias" else {}
    return resolve(method, **cut, **({"length": 2} if "length" in fields else {}))


@pytest.mark.parametrize("law", FAST, ids=str)
@pytest.mark.parametrize(("method", "shape"), CASES)
def test_law(method, shape, law):
    case = Case(zoo_base(shape), small(method))
    if method == "head" and shape == "llama":
        with pytest.raises(SiteError, match="the model has no head"):
            case.start()
    elif law.applies(case) and not (shape == "llama" and law.name in IN_DOUBLE):
        law(case)


@pytest.mark.parametrize("law", SLOW, ids=str)
@pytest.mark.parametrize(("method", "shape"), sorted(COMPILED))
def test_slow_law(method, shape, law):
    law(Case(zoo_base(shape), small(method)))


@cache
def built(name):
    model, batch = labelled(name)
    return model, batch, outputs(model, batch), snapshot(model)


@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize("method", list(methods))
def test_every_method_works_on_every_model_or_says_what_is_missing(method, name):
    model, batch, before, untouched = built(name)
    recipe = small(method)
    try:
        made = graft(model, recipe, calibration=[batch] if "labels" in batch else None)
    except SiteError as error:
        says(error, "has no head" if method == "head" else "there are the")
        unchanged(snapshot(model), untouched)
        return
    except RecipeError as error:
        if "calibration" not in str(error) or "labels" in batch:
            raise
        return
    try:
        fresh = outputs(model, batch)
        if all(slot.delta.starts_as_identity for slot in made.all_slots):
            close(fresh, before, 1e-5)
        Case(zoo_base(name), recipe).disturb(made)
        result = model(**batch)
        assert not torch.equal(outputs(model, batch), before)
        zoo.output(result).square().sum().backward()
        auxiliary = {f"{slot.key}/{name}" for slot in made.all_slots for name in slot.delta.auxiliary}
        assert all(p.grad is not None for name, p in made.named_parameters() if name not in auxiliary)
    finally:
        made.detach()
    unchanged(snapshot(model), untouched)
    identical(outputs(model, batch), before)
