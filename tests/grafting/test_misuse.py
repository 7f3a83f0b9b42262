"""Misuse is refused, or undone, and leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from finegraft.errors import NotMergeable, RecipeError, SiteError
from finegraft.grafting import graft, grafts, load, merge, route, writing
from tests.models import zoo

LORA = {"rank": 2, "heads": "none"}


def trained(made):
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return made


@pytest.fixture
def bert():
    return zoo.build("bert")


def picture(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        [type(module) for module in model.modules()],
        set(model.__dict__),
    )


def assert_as(model, before):
    now = picture(model)
    assert list(now[0]) == list(before[0])
    assert all(torch.equal(now[0][name], before[0][name]) for name in now[0])
    assert now[1:] == before[1:]


def test_a_batch_of_another_size_than_the_route_is_refused(bert):
    model, batch = bert
    made = trained(graft(model, "lora", **LORA))
    for count in (1, 3, 4):
        with pytest.raises(RecipeError, match=f"route was given {count} samples"), route(model, [made] * count):
            model(**batch)


def test_a_route_in_a_route_and_changes_inside_are_refused(bert):
    model, batch = bert
    made = trained(graft(model, "lora", **LORA))
    with route(model, [made, None]):
        expected = zoo.output(model(**batch))
        for forbidden in (made.merge, made.detach, lambda: graft(model, "bitfit"), lambda: copy.deepcopy(model)):
            with pytest.raises(RecipeError, match="outside of the route"):
                forbidden()
        with pytest.raises(RecipeError, match="outside of the route"), route(model, [None, made]):
            pass
        assert torch.equal(zoo.output(model(**batch)), expected)


def test_routing_to_a_disabled_graft_and_to_no_graft_is_refused(bert):
    model, _ = bert
    made = graft(model, "lora", **LORA)
    with pytest.raises(RecipeError, match="takes a graft"), route(model, ["lora", None]):
        pass
    with pytest.raises(RecipeError, match="takes a list"), route(model, made):
        pass
    made.enabled = False
    with pytest.raises(RecipeError, match="disabled"), route(model, [made, None]):
        pass


def test_merging_for_good_takes_what_is_meant_and_nothing_else(bert):
    model, batch = bert
    stranger = graft(zoo.build("bert")[0], "lora", **LORA)
    first, second = trained(graft(model, "lora", **LORA)), trained(graft(model, "lora", seed=1, **LORA))
    with pytest.raises(RecipeError, match="no graft on this model"):
        merge(model, stranger)
    second.enabled = False
    with pytest.raises(RecipeError, match="disabled"):
        merge(model, second)
    expected = zoo.output(model(**batch))
    merge(model)
    assert grafts(model) == []
    assert torch.allclose(zoo.output(model(**batch)), expected, atol=1e-5)
    assert "detached" in repr(first)


def test_a_merge_that_fails_changes_no_state(bert):
    model, batch = bert
    first = trained(graft(model, "lora", **LORA))
    first.merge()
    trained(graft(model, "houlsby", heads="none"))
    expected = zoo.output(model(**batch))
    with pytest.raises(NotMergeable):
        merge(model)
    assert first.merged
    assert torch.equal(zoo.output(model(**batch)), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, [1]])
def test_a_scale_is_a_finite_number(bert, value):
    made = graft(bert[0], "lora", **LORA)
    with pytest.raises(RecipeError, match="finite number"):
        made.scale = value
    assert made.scale == 1.0


def test_parts_of_a_grafted_model_and_models_of_grafted_parts_are_refused(bert):
    model, _ = bert
    inner = graft(model.bert, "lora", **LORA)
    with pytest.raises(RecipeError, match="'bert' carries grafts"):
        graft(model, "lora", **LORA)
    inner.detach()
    graft(model, "lora", **LORA)
    with pytest.raises(RecipeError, match="part of a larger model"):
        graft(model.bert, "lora", **LORA)


class Loud(nn.Linear):
    def forward(self, x):
        return 3 * torch.tanh(super().forward(x))


@pytest.mark.parametrize("what", ["low-rank", "bias", "scale-shift", "full"])
def test_layers_with_a_forward_of_their_own_change_by_their_weight(what):
    model, x = nn.Sequential(Loud(4, 4)), torch.randn(3, 4)
    settings = {"rank": 2} if what == "low-rank" else {}
    recipe = {"parts": [{"where": {"name": "0"}, "what": {"kind": what, **settings}}], "heads": "none"}
    made = trained(graft(model, recipe))
    y = model(x)
    made.merge()
    assert torch.allclose(model(x), y, atol=1e-6)


def test_a_graft_that_cannot_be_put_on_leaves_no_trace(bert, monkeypatch):
    tied, _ = zoo.build("llama-tied")
    tied.lm_head.forward = tied.lm_head.forward
    before = picture(tied)
    with pytest.raises(SiteError, match="forward of its own"):
        graft(tied, {"parts": [{"where": {"role": "embed"}, "what": {"kind": "low-rank", "rank": 2}}]})
    assert_as(tied, before)
    resnet, _ = zoo.build("resnet")
    norm = next(module for module in resnet.modules() if isinstance(module, nn.BatchNorm2d))
    norm.forward = norm.forward
    before = picture(resnet)
    with pytest.raises(SiteError, match="forward of its own"):
        graft(resnet, "head")
    assert_as(resnet, before)


@pytest.mark.parametrize("after", [0, 3])
def test_interruptions_while_grafting_merging_and_scaling_are_undone(bert, monkeypatch, after):
    model, batch = bert
    before, put = picture(model), writing._put
    left = [after]

    def failing(*args, **kwargs):
        if left[0] == 0:
            left[0] = -1
            put(*args, **kwargs)
            raise KeyboardInterrupt
        left[0] -= 1
        put(*args, **kwargs)

    monkeypatch.setattr(writing, "_put", failing)
    with pytest.raises(KeyboardInterrupt):
        graft(model, "full")
    assert_as(model, before)
    made = trained(graft(model, "lora", **LORA))
    expected = zoo.output(model(**batch))
    left[0] = after
    with pytest.raises(KeyboardInterrupt):
        made.merge()
    assert not made.merged
    assert torch.equal(zoo.output(model(**batch)), expected)
    made.merge()
    left[0] = after
    with pytest.raises(KeyboardInterrupt):
        made.scale = 0.5
    assert made.scale == 1.0
    left[0] = after
    with pytest.raises(KeyboardInterrupt):
        made.detach()
    made.detach()
    assert_as(model, before)


def test_kinds_that_do_not_go_together_are_refused_across_parts(bert):
    model, _ = bert
    before = picture(model)
    parts = [{"where": {"role": "q"}, "what": {"kind": kind}} for kind in ("bottleneck", "magnitude")]
    with pytest.raises(SiteError, match="needs the weight beneath"):
        graft(model, {"parts": parts})
    assert_as(model, before)


def test_what_cannot_carry_a_graft_is_refused(bert):
    model, _ = bert
    for odd in (None, "bert", nn.Linear):
        with pytest.raises(RecipeError, match=r"goes on a torch\.nn\.Module"):
            graft(odd, "lora")
    with pytest.raises(RecipeError, match="seed"):
        graft(model, "lora", seed=1.5)
    with torch.inference_mode(), pytest.raises(RecipeError, match="inference_mode"):
        graft(model, "lora")
    normed = nn.Sequential(nn.Linear(4, 4))
    register_parametrization(normed[0], "weight", nn.Identity())
    with pytest.raises(SiteError, match="parametrization"):
        graft(normed, {"parts": [{"where": {"type": "linear"}, "what": {"kind": "low-rank", "rank": 2}}]})


def test_the_wrapper_of_compile_is_looked_through(bert, tmp_path):
    model, batch = bert
    made = trained(graft(torch.compile(model, backend="eager"), "lora", **LORA))
    assert grafts(model) == [made]
    expected = zoo.output(model(**batch))
    path = made.save(tmp_path / "graft")
    made.detach()
    load(path, torch.compile(model, backend="eager"))
    assert torch.equal(zoo.output(model(**batch)), expected)
