"""Routers of tokens, and messages along attention maps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from finegraft.deltas.graph_adapter import laplacian, probabilities
from finegraft.deltas.token_router import soft_top_k
from finegraft.errors import SiteError
from finegraft.grafting.chain import Chain
from tests.deltas.adapters import bottleneck, output, put, stir, transformer
from tests.models import zoo

TOKENS = 7


@pytest.fixture
def small():
    return transformer()


@pytest.fixture
def bert():
    return zoo.build("bert")


class TestRouters:
    def test_soft_top_k_sums_to_k(self):
        scores = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        factors = soft_top_k(scores, 4, 1.0)
        assert bool(((factors >= 0) & (factors <= 1)).all())
        torch.testing.assert_close(factors.sum(dim=1), torch.full((5,), 4.0, dtype=torch.float64), atol=1e-3, rtol=0)

    def test_all_tokens_chosen_is_the_base_and_its_adapter(self, bert):
        model, batch = bert
        adapter = bottleneck(width=4, placement="parallel", init="bert")
        made = put(model, [{"kind": "token-router", "share": 0.99}, adapter], where="block")
        found, slots = output(model, batch), [slot for slot in made.all_slots if slot.delta.kind == "bottleneck"]
        state = [{name: p.detach().clone() for name, p in slot.named_parameters()} for slot in slots]
        made.detach()
        alone = put(model, adapter, where="block")
        with torch.no_grad():
            for slot, tensors in zip(alone.all_slots, state, strict=True):
                for name, tensor in tensors.items():
                    getattr(slot, name).copy_(tensor)
        torch.testing.assert_close(output(model, batch), found)

    @pytest.mark.parametrize("name", ["bert", "llama", "t5-gated", "vit", "ast", "mixtral"])
    @pytest.mark.parametrize("choice", ["top-k", "threshold"])
    def test_tokens_left_out_give_what_computing_and_dropping_them_gives(self, name, choice, monkeypatch):
        model, batch = zoo.build(name)
        made = put(model, {"kind": "token-router", "choice": choice})
        stir(made, size=1.0)
        found = output(model, batch)
        monkeypatch.setattr(Chain, "needed", lambda self, x: None)
        torch.testing.assert_close(found, output(model, batch))

    @pytest.mark.parametrize(("where", "inner"), [("ffn", "mlp.down_proj"), ("block", "mlp.down_proj")])
    def test_the_base_runs_on_chosen_tokens_only(self, small, where, inner):
        model, x = small
        put(model, {"kind": "token-router", "share": 0.5}, where=where)
        seen = []
        model.get_submodule(f"layers.0.{inner}").register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        model(x)
        assert [shape.numel() for shape in seen] == [3 * 3 * 16]

    def test_a_block_gets_the_positions_and_masks_of_its_tokens(self):
        """Padding stays unseen: what it holds changes no output of a sample whose chosen tokens are the same."""
        model, batch = zoo.build("llama")
        put(model, {"kind": "token-router", "share": 0.99}, where="block")
        whole = output(model, batch)
        model, _ = zoo.build("llama")
        made = put(model, {"kind": "token-router", "share": 0.99}, where="block")  # gathers, and leaves none out
        for slot in made.all_slots:
            assert slot.delta._count(torch.zeros(2, TOKENS)) == TOKENS
        torch.testing.assert_close(output(model, batch), whole)

    def test_caches_of_other_choices_are_refused(self):
        model, batch = zoo.build("llama")
        put(model, {"kind": "token-router", "share": 0.5}, where="block")
        first = model(**batch, use_cache=True)
        with pytest.raises(SiteError, match="use_cache=False"):
            model(input_ids=batch["input_ids"][:, :1], past_key_values=first.past_key_values)

    def test_gates_that_are_closed_learn_too(self, small):
        model, x = small
        made = put(model, {"kind": "token-router", "choice": "threshold"})
        (slot,) = made.all_slots
        with torch.no_grad():
            slot.offset.fill_(-3.0)
        model(x).square().sum().backward()
        assert slot.score.grad.any()


class TestGraph:
    def call(self):
        generator = torch.Generator().manual_seed(0)
        queries, values = torch.randn(2, 2, 3, 5, 4, generator=generator)
        edges = torch.rand(2, 3, 5, 5, generator=generator).softmax(dim=-1)
        return edges, queries, values

    def test_a_power_of_two_weighs_by_attention_alone(self):
        edges, queries, values = self.call()
        found = laplacian(edges, queries, values, torch.tensor(2.0), torch.tensor(0.0))
        torch.testing.assert_close(found, edges @ values)

    def test_a_large_self_weight_keeps_features(self):
        """Against the released code, whose self-term is zero on a bipartite graph."""
        edges, queries, values = self.call()
        found = laplacian(edges, queries, values, torch.tensor(1.25), torch.tensor(1e9))
        torch.testing.assert_close(found, queries, atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("causal", [True, False])
    def test_probabilities_are_those_of_the_call(self, causal):
        _, query, value = self.call()
        edges = probabilities(query, value, None, is_causal=causal, scaling=0.3)
        expected = F.scaled_dot_product_attention(query, value, value, is_causal=causal, scale=0.3)
        torch.testing.assert_close(edges @ value, expected)


def test_copies_do_not_share_what_routers_note(small):
    model, x = small
    made = put(model, {"kind": "token-router", "choice": "threshold"}, control=["token-rate"])
    assert made.recipe.control[0].target == 0.5
    model(x)
    copy.deepcopy(model)(x)
