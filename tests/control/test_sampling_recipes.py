"""Rates that fall with depth, frozen lower blocks, fresh upper ones."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import finegraft as fg
from finegraft.errors import RecipeError, SiteError
from finegraft.grafting.make import resolve
from finegraft.locate.ops import op_for
from finegraft.locate.query import depths_below_head
from finegraft.registry import methods
from finegraft.testing.bits import snapshot, stored, unchanged
from tests.control.sampled import BLOCKS, Training, deep_model
from tests.models import zoo


def bert(layers=4):
    config = hf.BertConfig(
        vocab_size=20, hidden_size=64, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=96
    )
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(0, 20, (4, 6))
    return model.eval(), {"input_ids": ids, "labels": torch.tensor([0, 1, 0, 1])}


def rates(graft, lr):
    """The rate of every site of a graft."""
    names = {id(p): name.rsplit("/", 2)[0] for name, p in graft.named_parameters()}
    return {names[id(p)]: group["lr"] for group in graft.parameter_groups(lr) for p in group["params"]}


def test_rates_fall_geometrically_from_the_head_to_the_embeddings():
    model, _ = bert()
    found = rates(fg.graft(model, "layerwise-decay", layer_decay=0.5), 1.0)
    assert {rate for name, rate in found.items() if "classifier" in name} == {1.0}
    assert {rate for name, rate in found.items() if "pooler" in name} == {1.0}
    for layer in range(4):
        assert {rate for name, rate in found.items() if f"layer.{layer}." in name} == {0.5 ** (4 - layer)}
    assert {rate for name, rate in found.items() if ".embeddings." in name} == {0.5**5}


def test_rates_multiply_with_those_by_name_and_keep_the_rate_of_heads():
    model, _ = bert()
    recipe = {
        "parts": [{"where": {"role": ["q"]}, "what": "low-rank"}],
        "train": {"lr": 1.0, "head_lr": 3.0, "layer_decay": 0.5, "lr_ratios": {"b": 16.0}},
    }
    graft = fg.graft(model, recipe)
    groups = {group["name"]: group["lr"] for group in graft.parameter_groups()}
    assert groups["head"] == 3.0
    assert groups["b, 1 below the head"] == 8.0
    assert groups["change, 4 below the head"] == 1 / 16
    assert sum(len(group["params"]) for group in graft.parameter_groups()) == len(list(graft.parameters()))


def test_depth_is_that_of_the_model_whatever_a_graft_changes():
    model, _ = bert()
    graft = fg.graft(model, {"parts": [{"where": {"role": "q", "layer": 1}, "what": "full"}], "heads": "none"})
    decayed = graft.recipe.override(layer_decay=0.5)
    graft.detach()
    assert set(rates(fg.graft(model, decayed), 1.0).values()) == {0.5**3}


def test_each_stack_has_depths_of_its_own():
    found = depths_below_head(fg.sites(zoo.build("t5-gated")[0]))
    assert {name.split(".")[0]: depth for name, depth in found.items() if ".block.1." in name} == {
        "encoder": 1,
        "decoder": 1,
    }
    assert found["shared"] == 3 and found["decoder.final_layer_norm"] == 0


def test_lower_blocks_and_embeddings_stay_bit_for_bit():
    training = Training("freeze-lower", total=2)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters() if "finegraft" not in name}
    training.step()
    training.step()
    training.model(**training.batch)
    now = dict(training.model.named_parameters())
    for name, tensor in before.items():
        frozen = "embed" in name or any(f"layers.{i}." in name for i in range(BLOCKS // 2))
        assert torch.equal(now[name], tensor) is frozen, name


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("first:50%", [0, 1, 2, 3]),
        ("last:25%", [6, 7]),
        ("first:1%", [0]),
        ("last:100%", list(range(8))),
        ("!first:50%", [4, 5, 6, 7]),
        (["!last:25%", "!first:60%"], [4, 5]),
    ],
)
def test_shares_of_the_blocks(layer, expected):
    found = fg.sites(deep_model()[0]).where(role="q", layer=layer)
    assert [site.layer for site in found] == expected


@pytest.mark.parametrize("layer", ["first:0%", "last:101%"])
def test_impossible_shares_of_the_blocks(layer):
    with pytest.raises(SiteError, match=f"layer '{layer}' is no share; give one from 1% to 100%"):
        fg.sites(deep_model()[0]).where(layer=layer)


@pytest.mark.parametrize("top", [1, 2])
def test_fresh_starts_touch_exactly_the_highest_blocks_and_the_pooler(top):
    model, batch = bert()
    whole, before, output = snapshot(model), stored(model), model(**batch).logits
    recipe = methods["top-reinit"].data()
    for part in recipe["parts"][:2]:
        part["where"]["layer"] = part["where"]["layer"].replace("1", str(top))
    graft = fg.graft(model, recipe)
    assert not torch.equal(model(**batch).logits, output)
    fresh = [f"layer.{i}." for i in range(4 - top, 4)] + ["pooler"]
    now, parameters = stored(model), dict(model.named_parameters())
    for name, bits in before.items():
        is_fresh = any(part in name for part in fresh)
        assert torch.equal(now[name], bits) is not is_fresh, name
        if is_fresh:
            _assert_fresh(name, parameters[name])
    graft.detach()
    unchanged(snapshot(model), whole)


def _assert_fresh(name, tensor):
    if name.endswith("bias"):
        assert tensor.abs().max() < 1e-6, name
    elif "LayerNorm" in name:
        torch.testing.assert_close(tensor, torch.ones_like(tensor))
    else:
        assert abs(float(tensor.std()) - 0.02) < 0.002 and abs(float(tensor.mean())) < 0.002, name


def test_a_model_without_a_pooler_does_without():
    model, batch = deep_model(3)
    output = model(**batch).logits
    graft = fg.graft(model, "top-reinit")
    assert not torch.equal(model(**batch).logits, output)
    assert {p.site.layer for p in graft.placements if not p.slots[0].delta.starts_as_identity} == {2}


def test_an_optional_part_is_still_held_against_the_grammar():
    part = {"where": {"layer": "top"}, "what": "full", "optional": True}
    with pytest.raises(SiteError, match="layer 'top' is not understood"):
        fg.graft(deep_model(2)[0], {"parts": [part]})


def test_a_recipe_of_optional_parts_that_match_nothing_trains_nothing():
    part = {"where": {"name": "*pooler*"}, "what": "full", "optional": True}
    with pytest.raises(SiteError, match="trains nothing on this model"):
        fg.graft(deep_model(2)[0], {"parts": [part]})


def test_a_norm_that_adds_one_to_its_gain_starts_at_zero():
    class GemmaRMSNorm(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.weight, self.gain = nn.Parameter(torch.rand(6)), gain

        def forward(self, x):
            return (self.gain + self.weight) * x / x.norm(dim=-1, keepdim=True)

    for module, expected in ((GemmaRMSNorm(1), 0.0), (GemmaRMSNorm(0), 1.0), (nn.LayerNorm(6), 1.0)):
        assert op_for(module).unit_gain(module) == expected


def test_a_decay_by_layers_needs_layers():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    graft = fg.graft(model, {"parts": [{"where": {"name": "0"}, "what": "full"}], "train": {"layer_decay": 0.9}})
    with pytest.raises(RecipeError, match="the model has no blocks"):
        graft.parameter_groups()


def test_one_controller_alone_says_which_sites_train():
    sampling = {"kind": "sample-blocks", "count": 1, "every": 2}
    with pytest.raises(RecipeError, match="sample-blocks and importance-sampling would each say which sites train"):
        resolve({"parts": [], "control": [sampling, "importance-sampling"]})


def test_roles_that_always_train_are_roles():
    with pytest.raises(RecipeError, match="always has the unknown role 'embeds'; did you mean 'embed'"):
        resolve({"parts": [], "control": [{"kind": "sample-blocks", "count": 1, "every": 2, "always": ["embeds"]}]})
