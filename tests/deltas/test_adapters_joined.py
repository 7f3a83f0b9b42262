"""Fusing and merging trained adapters."""

from __future__ import annotations

import pytest
import torch

from finegraft.errors import NotMergeable, RecipeError
from finegraft.grafting.fusing import fuse, merge_adapters
from finegraft.grafting.load import load
from finegraft.grafting.merging import grafts
from finegraft.testing.base_models import Transformer
from tests.deltas.adapters import bottleneck, put, stir, transformer


@pytest.fixture
def small():
    return transformer()


class TestJoining:
    def grafts(self, model, number=2, **settings):
        found = [put(model, bottleneck(width=6, init="bert", **settings)) for _ in range(number)]
        for seed, one in enumerate(found):
            stir(one, seed)
        return found

    def test_fusing_one_adapter_gives_it_back(self, small):
        model, x = small
        (one,) = self.grafts(model, 1)
        expected = model(x)
        fused = fuse(model, [one])
        with torch.no_grad():
            for slot in fused.all_slots:
                slot.to_value.copy_(torch.eye(8))
        torch.testing.assert_close(model(x), expected)
        assert not one.enabled

    def test_the_order_of_adapters_is_of_no_matter_and_they_do_not_train(self, small):
        model, x = small
        found = self.grafts(model, 3)
        fused = fuse(model, found)
        expected = model(x)
        expected.square().sum().backward()
        assert {name.rpartition("/")[2] for name, _ in fused.named_parameters()} == {
            "to_query", "to_query_bias", "to_key", "to_key_bias", "to_value",
        }  # fmt: skip
        assert fused.num_trainable == 3 * 8 * 8 + 2 * 8
        assert all(parameter.grad is None for one in found for parameter in one.parameters())
        state = fused.state()
        fused.detach()
        fuse(model, found[::-1]).load_state(state)
        torch.testing.assert_close(model(x), expected)

    def test_a_fusion_is_saved_with_its_adapters(self, small, tmp_path):
        model, x = small
        fused = fuse(model, self.grafts(model))
        expected = model(x)
        path = fused.save(tmp_path / "fused")
        torch.manual_seed(0)
        again = Transformer(8, 16, 4).eval()
        load(path, again)
        torch.testing.assert_close(again(x), expected)
        with pytest.raises(NotMergeable, match="adapter-fusion"):
            fused.merge()

    def test_transport_undoes_permutations_and_plain_means_do_not(self, small):
        model, x = small
        first, second, third = self.grafts(model, 3)
        with torch.no_grad():
            for other in (second, third):
                order = torch.randperm(6)
                for own, copied in zip(first.all_slots, other.all_slots, strict=True):
                    copied.down.copy_(own.down[order])
                    copied.down_bias.copy_(own.down_bias[order])
                    copied.up.copy_(own.up[:, order])
                    copied.up_bias.copy_(own.up_bias)
            second.enabled = third.enabled = False
            expected = model(x)
            second.enabled = third.enabled = True
            merged = merge_adapters(model, [first, second, third])
            torch.testing.assert_close(model(x), expected)
            merged.detach()
            merge_adapters(model, [first, second, third], align="none")
            assert not torch.allclose(model(x), expected, atol=1e-3)

    def test_the_mean_of_equals_is_one_of_them(self, small):
        """Against a mean that was divided twice."""
        model, x = small
        (one,) = self.grafts(model, 1)
        expected = model(x)
        twin = put(model, bottleneck(width=6, init="bert"))
        twin.load_state(one.state())
        merge_adapters(model, [one, twin], align="none")
        torch.testing.assert_close(model(x), expected)

    def test_what_does_not_belong_together_says_so(self, small):
        model, _ = small
        one, other = self.grafts(model, 1)[0], put(model, bottleneck(width=4))
        for join in (fuse, merge_adapters):
            with pytest.raises(RecipeError, match="different settings"):
                join(model, [one, other])
        with pytest.raises(RecipeError, match="same sites"):
            fuse(model, [one, put(model, bottleneck(width=6), where="attn")])

    def test_grafts_that_are_not_on_the_model_or_given_twice_are_refused(self, small):
        model, _ = small
        one = self.grafts(model, 1)[0]
        stranger = self.grafts(transformer()[0], 1)[0]
        for join in (fuse, merge_adapters):
            for given in (one, None, [], ["a"]):
                with pytest.raises(RecipeError, match="list of grafts|no graft on this model"):
                    join(model, given)
            with pytest.raises(RecipeError, match="no graft on this model"):
                join(model, [one, stranger])
            with pytest.raises(RecipeError, match="twice"):
                join(model, [one, one])
        with pytest.raises(RecipeError, match="align is one of"):
            merge_adapters(model, [one], align="means")
        assert one.enabled
        assert grafts(model) == [one]
