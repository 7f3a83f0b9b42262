"""Attention calls are met whatever was set in Transformers' registry, or the model says so."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finegraft.errors import SiteError
from finegraft.grafting import graft
from finegraft.grafting.attention import Call
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


def changed(name, kind, **settings):
    model, batch = zoo.build(name)
    what = {"kind": kind, **settings}
    made = graft(model, {"parts": [{"where": {"role": "attention"}, "what": what}], "heads": "none"})
    return model, batch, made


def attend(slot, query, key, value, mask=None, **settings):
    """One attention call under a change, on a function that lays everything open."""

    def plain(q, k, v, m, scaling=None, **_):
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scaling
        scores = scores if m is None else scores + m
        seen.append(scores)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    seen = []
    call = Call(plain, settings.pop("module", None), settings.pop("x", None))
    y, _ = slot.delta.attend(slot, call, query, key, value, mask, is_causal=False, scaling=0.5, **settings)
    return y, seen[0]


def states():
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)


def test_other_implementations_are_an_error():
    model, batch, _ = changed("llama", "attention-gate")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(SiteError, match="takes no changes"):
        model(**batch)


@pytest.mark.parametrize(("kind", "settings"), [("attention-gate", {}), ("adaption-prompt", {})])
@pytest.mark.parametrize("name", ["bert", "llama", "t5-gated", "vit", "ast", "whisper"])
def test_gates_start_as_the_identity_to_the_bit(name, kind, settings):
    model, batch = zoo.build(name)
    model.requires_grad_(False)
    before = zoo.output(model(**batch))
    made = graft(
        model, {"parts": [{"where": {"role": "attention"}, "what": {"kind": kind, **settings}}], "heads": "none"}
    )
    y = zoo.output(model(**batch))
    assert torch.equal(y, before)
    y.square().sum().backward()
    assert all(slot.gate.grad.any() for slot in made.all_slots)
    if kind == "adaption-prompt":
        assert not any(slot.prompt.grad.any() for slot in made.all_slots), "prompts train once gates have opened"


def test_an_open_gate_leaves_the_softmax_over_tokens_alone():
    model, _, made = changed("llama", "adaption-prompt", length=3)
    slot = made.all_slots[0]
    query, key, value = states()
    module = model.get_submodule(slot.site)
    y, scores = attend(slot, query, key, value, module=module)
    with torch.no_grad():
        slot.gate.fill_(20.0)
    opened, again = attend(slot, query, key, value, module=module)
    assert torch.equal(scores, again)
    prompts = slot.prompt @ module.k_proj.weight.T, slot.prompt @ module.v_proj.weight.T
    keys, values = (t.view(3, 2, 8).transpose(0, 1).repeat_interleave(2, 0) for t in prompts)
    own = (query @ keys.transpose(-1, -2) * 0.5).softmax(-1) @ values
    torch.testing.assert_close(opened, y + own.transpose(1, 2), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_output_gate_sees_its_own_token_alone_and_counts_by_variant():
    for per, width in (("head", 4), ("entry", 32)):
        _, _, made = changed("llama", "attention-gate", per=per)
        assert made.num_trainable == 2 * 32 * width
        slot = made.all_slots[0]
        slot.gate.normal_()
        query, key, value = states()
        x = torch.randn(2, 3, 32)
        y, _ = attend(slot, query, key, value, x=x)
        other = x.clone()
        other[:, 1] += 1.0
        moved, _ = attend(slot, query, key, value, x=other)
        assert torch.equal(y[:, [0, 2]], moved[:, [0, 2]])
        assert not torch.allclose(y[:, 1], moved[:, 1])


@torch.no_grad()
def test_a_residual_gate_moves_scores_of_the_prefix_alone_and_zero_is_prefix_tuning():
    _, _, made = changed("llama", "prefix", length=3, residual_gate=True, init_std=1.0)
    slot = made.all_slots[0]
    assert slot.alpha.item() == slot.tau.item() == 1.0
    query, key, value = states()
    y, scores = attend(slot, query, key, value)
    plain = query @ slot.keys.view(3, 2, 8).transpose(0, 1).repeat_interleave(2, 0).transpose(-1, -2) * 0.5
    torch.testing.assert_close(scores[..., :3], plain + plain.tanh())
    slot.alpha.zero_()
    closed, at_zero = attend(slot, query, key, value)
    torch.testing.assert_close(at_zero[..., :3], plain)
    assert torch.equal(at_zero[..., 3:], scores[..., 3:])
    _, _, other = changed("llama", "prefix", length=3)
    twin = other.all_slots[0]
    twin.keys.copy_(slot.keys)
    twin.values.copy_(slot.values)
    torch.testing.assert_close(attend(twin, query, key, value)[0], closed)
    assert not torch.allclose(y, closed)


@torch.no_grad()
def test_a_prefix_is_an_interpolation_with_attention_to_the_prefix():
    _, _, made = changed("llama", "prefix", length=3, init_std=1.0)
    slot = made.all_slots[0]
    query, key, value = states()
    y, _ = attend(slot, query, key, value)
    keys, values = (t.view(3, 2, 8).transpose(0, 1).repeat_interleave(2, 0) for t in (slot.keys, slot.values))
    own = query @ keys.transpose(-1, -2) * 0.5
    rest = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.5
    share = own.exp().sum(-1, keepdim=True) / (own.exp().sum(-1, keepdim=True) + rest.exp().sum(-1, keepdim=True))
    expected = (1 - share) * (rest.softmax(-1) @ value.repeat_interleave(2, 1)) + share * (own.softmax(-1) @ values)
    torch.testing.assert_close(y, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)
