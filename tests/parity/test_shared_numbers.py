"""With the same numbers copied in, vector banks and GLoRA give PEFT's outputs and gradients."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from finegraft.grafting import graft
from finegraft.grafting.slot import Slot
from tests.models import zoo
from tests.parity.test_same_numbers import assert_close
from tests.parity.twins import LINEAR, loss

TOLERANCE = 1e-5
Pairs = list[tuple[nn.Parameter, nn.Parameter]]


def bank_pairs(slot: Slot, layer: Any, theirs: Any) -> Pairs:
    own = [(slot.logits_a, layer.vblora_logits_A["default"]), (slot.logits_b, layer.vblora_logits_B["default"])]
    return own if slot.borrowed else [*own, (slot.bank, theirs.base_model.vblora_vector_bank["default"])]


def glora_pairs(slot: Slot, layer: Any, theirs: Any) -> Pairs:
    if slot.delta.kind == "bias-map":
        c = layer.glora_C["default"]
        low_rank = [(slot.c_up, c.Xd), (slot.c, c.Xu)] if slot.delta.rank else [(slot.c, c.X)]
        return [*low_rank, (slot.d, layer.glora_D["default"].X), (slot.e, layer.glora_E["default"].X)]
    path = layer.glora_A["default"] if slot.delta.kind == "low-rank-gain" else layer.glora_B["default"]
    return [(slot.b, path.Xd), (slot.a, path.Xu)]


def assert_same(what: Any, config: Any, pairs_at: Any, name: str) -> None:
    ours, batch = zoo.build(name, 3)
    theirs, _ = zoo.build(name, 3)
    grafted = graft(ours, {"parts": [{"where": LINEAR, "what": what}], "heads": "none"})
    config.target_modules = {slot.site for slot in grafted.all_slots}
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    rng = torch.Generator().manual_seed(7)
    pairs = [
        pair
        for slot in grafted.all_slots
        for pair in pairs_at(slot, theirs.base_model.model.get_submodule(slot.site), theirs)
    ]
    with torch.no_grad():
        for mine, other in pairs:
            mine.add_(0.2 * torch.randn(mine.shape, generator=rng))
            other.copy_(mine.reshape(other.shape))
    y, their_y = zoo.output(ours(**batch)), zoo.output(theirs(**batch))
    assert_close(y.detach(), their_y.detach(), TOLERANCE)
    loss(y).backward()
    loss(their_y).backward()
    for mine, other in pairs:
        assert_close(_grad(mine), _grad(other).reshape(mine.shape), TOLERANCE)
    assert len(pairs) == len(list(grafted.parameters()))


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_vector_bank(model: str) -> None:
    config = peft.VBLoRAConfig(r=4, num_vectors=10, vector_length=16, topk=3)
    what = {"kind": "vector-bank", "vectors": 10, "length": 16, "top": 3}
    assert_same(what, config, bank_pairs, model)


@pytest.mark.parametrize("prompt", ["lora", "vector"])
def test_glora(prompt: str) -> None:
    config = peft.GloraConfig(r=4, config_A_B="lora", config_C=prompt, config_D_E="vector")
    what = [
        {"kind": "bias-map", "rank": 4 if prompt == "lora" else None},
        {"kind": "low-rank-gain", "rank": 4},
        {"kind": "low-rank", "rank": 4, "alpha": 4.0},
    ]
    assert_same(what, config, glora_pairs, "bert")
