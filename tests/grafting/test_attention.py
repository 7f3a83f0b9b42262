"""Attention calls are met whatever was set in Transformers' registry, or the model says so."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finegraft.errors import SiteError
from finegraft.grafting import graft
from tests.models import zoo


@pytest.fixture
def own_function(monkeypatch):
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    plain = getattr(plain, "__wrapped__", plain)

    def attend(module, *args, **kwargs):
        return plain(module, *args, **kwargs)

    return lambda: monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)


def test_a_function_that_was_set_before_grafting_is_met(own_function):
    own_function()
    model, batch = zoo.build("bert")
    before = zoo.output(model(**batch))
    made = graft(model, "prefix-tuning", heads="none")
    assert not torch.equal(zoo.output(model(**batch)), before)
    zoo.output(model(**batch)).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_a_function_that_is_set_after_grafting_is_an_error(own_function):
    model, batch = zoo.build("bert")
    made = graft(model, "prefix-tuning", heads="none")
    own_function()
    with pytest.raises(SiteError, match="without its grafted attention call"):
        model(**batch)
    with made.disabled():
        model(**batch)
