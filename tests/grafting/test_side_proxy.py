"""Proxy tuning: a base that decodes with what tuning changed in a small model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

import finegraft as fg
from finegraft.errors import RecipeError
from tests.models import zoo

SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def small(width=16, vocabulary=zoo.VOCABULARY):
    torch.manual_seed(1)
    config = hf.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def tuned(model, size=0.5):
    graft = fg.graft(model, "lora", rank=2)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return graft


def padded(batch):
    ids = batch["input_ids"][:, :5].clone()
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("beams", [1, 2])
def test_equal_small_models_leave_the_base_exactly(beams):
    base, batch = zoo.build("llama")
    one = small()
    proxy = fg.proxy(base, (one, copy.deepcopy(one)))
    inputs = padded(batch)
    assert torch.equal(
        proxy.generate(**inputs, num_beams=beams, **SETTINGS), base.generate(**inputs, num_beams=beams, **SETTINGS)
    )
    with torch.no_grad():
        assert torch.equal(proxy(**inputs).logits, base(**inputs).logits)


def test_a_fresh_graft_and_strength_zero_leave_the_base_exactly():
    base, batch = zoo.build("llama")
    with torch.no_grad():
        before = base(**batch).logits
    assert torch.equal(fg.proxy(base, fg.graft(small(), "lora", rank=2))(**batch).logits, before)
    assert torch.equal(fg.proxy(base, tuned(small()), strength=0.0)(**batch).logits, before)


def test_logits_are_the_sum_and_the_graft_is_in_force_afterwards():
    base, batch = zoo.build("llama")
    model = small()
    graft = tuned(model)
    with torch.no_grad():
        after = model(**batch).logits
        with graft.disabled():
            before = model(**batch).logits
        expected = base(**batch).logits + 2 * (after - before)
    proxy = fg.proxy(base, graft, strength=2.0)
    torch.testing.assert_close(proxy(**batch).logits, expected)
    assert graft.enabled
    result = proxy(**batch, labels=batch["input_ids"])
    expected_loss = base.loss_function(logits=expected, labels=batch["input_ids"], vocab_size=zoo.VOCABULARY)
    torch.testing.assert_close(result.loss, expected_loss)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_base_that_is_the_untuned_model_decodes_as_the_tuned_one(beams):
    """So beams, padding and the processor's normaliser are right, step by step."""
    _, batch = zoo.build("llama")
    model = small()
    graft = tuned(model)
    inputs = padded(batch)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    expected = model.generate(**inputs, **settings)
    proxy = fg.proxy(small(), graft)
    assert torch.equal(proxy.generate(**inputs, **settings), expected)
    with graft.disabled():
        assert not torch.equal(model.generate(**inputs, **settings), expected)


def test_log_probabilities_stay_normalised():
    base, batch = zoo.build("llama")
    scores = torch.log_softmax(torch.randn(2, zoo.VOCABULARY), dim=-1)
    found = fg.proxy(base, tuned(small())).processor()(batch["input_ids"], scores)
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(2), atol=1e-5, rtol=0)
    assert not torch.allclose(found, scores, atol=1e-3)


def test_classifiers_of_equal_classes():
    base, batch = zoo.build("bert")
    other, _ = zoo.build("roberta")
    proxy = fg.proxy(base, tuned(other))
    result = proxy(**batch, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(result.loss, torch.nn.functional.cross_entropy(result.logits, torch.tensor([0, 1])))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda base: (base, tuned(small(vocabulary=60))), "one vocabulary"),
        (lambda base: (base, small()), "takes a graft on a small model"),
        (lambda base: (base, tuned(small()), float("nan")), "finite number"),
    ],
)
def test_what_does_not_go_together_says_so(arguments, words):
    base, small_model, *strength = arguments(zoo.build("llama")[0])
    with pytest.raises(RecipeError, match=words):
        fg.proxy(base, small_model, **({"strength": strength[0]} if strength else {}))


def test_a_merged_or_disabled_graft_says_so():
    graft = tuned(small())
    graft.enabled = False
    with pytest.raises(RecipeError, match="no change to add"):
        fg.proxy(zoo.build("llama")[0], graft)
    graft.enabled = True
    with pytest.raises(RecipeError, match=r"a torch\.nn\.Module, not a str"):
        fg.proxy("llama", graft)
    graft.merge()
    with pytest.raises(RecipeError, match="merged"):
        fg.proxy(zoo.build("llama")[0], graft)
