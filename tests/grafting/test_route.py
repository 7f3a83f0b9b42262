"""A graft of its own for every sample, where layers can tell samples apart and where the model has to run in parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finegraft.errors import RecipeError
from finegraft.grafting import graft, route
from finegraft.grafting.make import resolve
from finegraft.grafting.splitting import sees_samples
from finegraft.locate.find import sites
from finegraft.testing.bits import snapshot, unchanged
from finegraft.testing.case import Case
from finegraft.testing.laws.company import every_sample_can_have_its_own_graft
from tests.models import zoo
from tests.properties.zoo_bases import labelled, zoo_base

EXPERTS = {"parts": [{"where": {"type": "tensor"}, "what": {"kind": "low-rank", "rank": 1}}], "heads": "none"}
EVERYTHING = {"parts": [{"where": {}, "what": {"kind": "full"}}], "heads": "none"}


@pytest.fixture
def mixtral():
    model, batch = labelled("mixtral")
    grafts = [graft(model, EXPERTS, seed=seed) for seed in (0, 1)]
    for seed, made in enumerate(grafts):
        Case(zoo_base("mixtral"), made.recipe).disturb(made, seed)
    return model, batch, grafts


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2-moe", "t5-gated", "gpt2", "torch-encoder", "whisper", "cifar-resnet"]
)
def test_changes_of_every_tensor_of_a_model(name):
    every_sample_can_have_its_own_graft(Case(zoo_base(name), resolve(EVERYTHING)))


def test_a_loss_is_the_mean_over_samples(mixtral):
    model, batch, (first, second) = mixtral
    alone = []
    for row, made in enumerate((first, second)):
        with route(model, [made]):
            alone.append(model(**{n: v[row : row + 1] for n, v in batch.items()}).loss)
    with route(model, [first, second]):
        loss = model(**batch).loss
    torch.testing.assert_close(loss, (alone[0] + alone[1]) / 2)


def test_samples_and_tokens_on_one_axis_stay_in_order(mixtral):
    model, batch, (first, second) = mixtral
    batch = {name: torch.cat([value, value.flip(0)]) for name, value in batch.items()}
    with torch.no_grad():
        with route(model, [first, second, first, second]):
            routed = model(**batch, output_router_logits=True)
        for made, rows in ((first, [0, 2]), (second, [1, 3])):
            with route(model, [made, made]):
                alone = model(**{n: v[rows] for n, v in batch.items()}, output_router_logits=True)
            torch.testing.assert_close(routed.logits[rows], alone.logits)
            tokens = routed.router_logits[1].view(4, -1, 4)[rows]
            torch.testing.assert_close(tokens.flatten(0, 1), alone.router_logits[1])


def test_generation_needs_no_cache(mixtral):
    model, batch, grafts = mixtral
    model.generation_config.pad_token_id = 0
    with route(model, grafts):
        with pytest.raises(RecipeError, match=r"an input is a DynamicCache, .* use_cache=False"):
            model.generate(batch["input_ids"], max_new_tokens=2)
        tokens = model.generate(batch["input_ids"], max_new_tokens=2, use_cache=False)
    assert tokens.shape == (2, zoo.TOKENS + 2)


def test_everything_is_as_before_afterwards(mixtral):
    model, batch, (first, second) = mixtral
    with torch.no_grad():
        model(**batch)
        before, logits = snapshot(model), model(**batch).logits
        with route(model, [first, None]):
            model(**batch)
        with pytest.raises(ZeroDivisionError), route(model, [second, first]):
            model(**batch)
            1 / 0
        unchanged(snapshot(model), before)
        assert torch.equal(model(**batch).logits, logits)


def test_a_batch_of_another_size(mixtral):
    model, batch, (first, second) = mixtral
    with (
        route(model, [first, second, None]),
        pytest.raises(RecipeError, match=r"route was given 3 samples; the batch has tensors of shapes \[\(2, 7\)"),
    ):
        model(**batch)


def test_order_is_that_of_attaching(mixtral):
    model, batch, (first, second) = mixtral
    found = []
    for own in ([first, second], [second, first]):
        with torch.no_grad(), route(model, [own, None]):
            found.append(model(**batch).logits)
    assert torch.equal(*found)


def test_grafts_that_cannot_be_routed(mixtral):
    model, _, (first, second) = mixtral
    second.detach()
    with pytest.raises(RecipeError, match="is not on this model"), route(model, [first, second]):
        pass
    first.merge()
    with pytest.raises(RecipeError, match=r"is merged, .* call unmerge\(\) first"), route(model, [first, None]):
        pass
    with pytest.raises(RecipeError, match="route needs one graft or None for each sample"), route(model, []):
        pass
    with pytest.raises(RecipeError, match="and a model with grafts"), route(nn.Linear(2, 2), [None]):
        pass


def test_which_sites_see_samples():
    moe = sites(zoo.build("mixtral")[0])
    assert not any(sees_samples(site) for site in moe.where(type="tensor"))
    assert all(sees_samples(site) for site in moe.where(type=["linear", "embedding", "norm"]))
    assert all(sees_samples(site) for site in moe.where(role=["attn", "ffn"]))
    t5 = sites(zoo.build("t5-gated")[0])
    assert not any(sees_samples(site) for site in t5.where(name="*relative_attention_bias"))
    assert sees_samples(t5["shared"])


class ExpertList(nn.Module):
    """Experts as layers, each called with the tokens that are sent to it."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def forward(self, x):
        flat = x.flatten(0, 1)
        first = flat[:, 0] > 0
        y = torch.zeros_like(flat)
        y[first], y[~first] = self.experts[0](flat[first]), self.experts[1](flat[~first])
        return y.view(x.shape)


def test_experts_that_are_layers():
    torch.manual_seed(0)
    model, x = ExpertList(), torch.randn(4, 8, 6)
    recipe = {"parts": [{"where": {"type": "linear"}, "what": {"kind": "low-rank", "rank": 2}}], "heads": "none"}
    pair = [graft(model, recipe, seed=seed) for seed in (0, 1)]
    for made in pair:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_()
    alone = []
    for row in range(4):
        with route(model, [pair[row % 2]]):
            alone.append(model(x[row : row + 1]))
    with route(model, [pair[row % 2] for row in range(4)]):
        torch.testing.assert_close(model(x), torch.cat(alone))
