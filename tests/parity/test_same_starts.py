"""Fresh grafts start where PEFT's do: the same factors of the weight, the same magnitudes, the base's own outputs."""

from __future__ import annotations

import copy

import pytest
import torch

from finegraft.grafting import graft
from finegraft.registry import methods
from tests.models import zoo
from tests.parity.test_same_numbers import assert_close
from tests.parity.twins import METHODS, method_twins

MODELS = pytest.mark.parametrize("name", ["bert", "llama", "vit"])
DECOMPOSING = pytest.mark.parametrize("method", ["pissa", "olora"])


@MODELS
@DECOMPOSING
def test_factors_of_the_weight(name: str, method: str) -> None:
    """``B A`` is PEFT's; of PiSSA's factors a pair may have the other sign."""
    pair = method_twins(name, method)
    assert len(pair.graft.placements) >= 12
    for slot in pair.graft.all_slots:
        layer = pair.theirs.base_model.model.get_submodule(slot.site)
        theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert_close(slot.b @ slot.a, theirs, 1e-5)
        assert_close(slot.a.abs(), layer.lora_A["default"].weight.abs(), 1e-4)


@MODELS
@DECOMPOSING
def test_the_base_keeps_its_weight(name: str, method: str) -> None:
    """PEFT moves the start out of the base's weight; ours out of the change. Base plus change is the base for both."""
    pair = method_twins(name, method)
    untouched, batch = zoo.build(name, seed=3)
    with torch.no_grad():
        expected = zoo.output(untouched(**batch))
    for y in pair.outputs():
        assert_close(y, expected, 1e-5)
    for slot in pair.graft.all_slots:
        base = untouched.get_submodule(slot.site).weight
        assert torch.equal(pair.ours.get_submodule(slot.site).weight, base)
        theirs = pair.theirs.base_model.model.get_submodule(slot.site).base_layer.weight
        assert not torch.allclose(theirs, base, atol=1e-2)
        assert_close(theirs + slot.delta.scale * slot.b0 @ slot.a0, base, 1e-5)


@MODELS
@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_graft_is_the_base(name: str, method: str) -> None:
    pair = method_twins(name, method)
    untouched, batch = zoo.build(name, seed=3)
    with torch.no_grad():
        expected = zoo.output(untouched(**batch))
    for y in pair.outputs():
        assert_close(y, expected, 1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2", "cifar-resnet"])
def test_magnitudes(name: str) -> None:
    pair = method_twins(name, "dora")
    found = [match for match in pair.matches if match.name.endswith("magnitude")]
    assert len(found) == len(pair.graft.placements)
    for match in found:
        assert_close(match.ours, match.in_our_layout(match.theirs), 1e-6)


@MODELS
@pytest.mark.parametrize("method", METHODS)
def test_as_many_numbers_train(name: str, method: str) -> None:
    pair = method_twins(name, method)
    theirs, _ = pair.theirs.get_nb_trainable_parameters()
    assert pair.graft.num_trainable == theirs
    assert {id(p) for p in pair.ours.parameters() if p.requires_grad} == {id(p) for p in pair.graft.parameters()}


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_decomposition_in_double_precision(method: str) -> None:
    """PEFT refuses double precision; ours decomposes in it, and agrees with single precision."""
    model, _ = zoo.build("llama")
    settings = {"rank": 4, "heads": "none"}
    single = graft(copy.deepcopy(model), methods[method], **settings)
    double = graft(model.double(), methods[method], **settings)
    for fine, coarse in zip(double.all_slots, single.all_slots, strict=True):
        assert fine.a.dtype == torch.float64
        assert_close(coarse.b.double() @ coarse.a.double(), fine.b @ fine.a, 1e-5)
