"""The graft as an object: what it reports, what it refuses, and what heads and tied tensors do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finegraft.errors import NotMergeable, RecipeError, SiteError, StoreError
from finegraft.grafting import graft, grafts, load, merge
from finegraft.grafting.make import resolve
from finegraft.recipe import Recipe
from finegraft.testing.bits import snapshot, unchanged
from tests.models import zoo


@pytest.fixture
def bert():
    return zoo.build("bert")


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))


def on(name, *kinds, **part):
    return {"parts": [{"where": {"name": name}, "what": list(kinds), **part}], "heads": "none"}


LOW_RANK, BOTTLENECK = {"kind": "low-rank", "rank": 2}, {"kind": "bottleneck", "width": 2}


@torch.no_grad()
def train(made):
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter))


class TestReports:
    def test_what_it_matched(self, bert):
        made = graft(bert[0], "lora", rank=2)
        assert made.report.startswith("lora: ")
        for words in ("q 2", "down 2", "head 1", f"{made.num_trainable:,} numbers train"):
            assert words in made.report

    def test_repr_says_its_state(self, mlp):
        made = graft(mlp, on("0", LOW_RANK))
        assert repr(made) == "Graft('custom', 1 sites, 28 trained, enabled)"
        made.enabled = False
        assert repr(made).endswith("disabled)")
        made.enabled = True
        made.merge()
        assert repr(made).endswith("merged)")

    def test_parameter_groups_follow_the_recipe(self, bert):
        made = graft(bert[0], "lora+", rank=2, head_lr=0.5, weight_decay=0.1)
        groups = {group["name"]: group for group in made.parameter_groups()}
        assert {name: group["lr"] for name, group in groups.items()} == {"change": 2e-4, "b": 16 * 2e-4, "head": 0.5}
        assert {group["weight_decay"] for group in groups.values()} == {0.1}
        assert sum(p.numel() for group in groups.values() for p in group["params"]) == made.num_trainable
        scaled = {group["name"]: group["lr"] for group in made.parameter_groups(lr=1.0)}
        assert scaled == {"change": 1.0, "b": 16.0, "head": 0.5}

    def test_names_are_stable(self, mlp):
        names = [name for name, _ in graft(mlp, on("*", LOW_RANK)).named_parameters()]
        assert names == ["0/0.0/a", "0/0.0/b", "2/0.0/a", "2/0.0/b"]
        assert list(dict(graft(mlp, on("*", LOW_RANK)).deltas)) == ["0/0.0", "2/0.0"]


class TestSeeds:
    def test_the_same_seed_gives_the_same_graft(self, mlp):
        first, again, other = (graft(mlp, on("0", LOW_RANK), seed=seed).state() for seed in (0, 0, 1))
        assert torch.equal(first["0/0.0/a"], again["0/0.0/a"])
        assert not torch.equal(first["0/0.0/a"], other["0/0.0/a"])

    def test_sites_start_apart(self):
        state = graft(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), on("*", LOW_RANK)).state()
        assert not torch.equal(state["0/0.0/a"], state["1/0.0/a"])

    def test_the_default_generator_is_left_alone(self, mlp):
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        graft(mlp, on("*", LOW_RANK))
        assert torch.equal(torch.rand(3), expected)


class TestRefusals:
    """Every refusal names the cause and leaves the model as it was."""

    @pytest.mark.parametrize(
        ("recipe", "words"),
        [
            (on("0", {"kind": "low-rank", "rank": 9}), "rank 9 is larger than '0'"),
            (on("9", LOW_RANK), "name '9' fits no site; names like it: 0"),
            (on(["0", "9"], LOW_RANK), "name '9' fits no site"),
            (on("0", BOTTLENECK, {"kind": "magnitude"}), "'bottleneck'"),
            (
                {"parts": [{"where": {"role": "q"}, "what": LOW_RANK}]},
                "role 'q' fits no site; there are the roles other",
            ),
            ({"parts": []}, "trains nothing on this model: it has no parts, and the model has no head"),
            (
                on("0", {"kind": "sparse"}, select={"unit": "row", "count": 99}),
                "'0' has 8 of unit 'row'; 99 were asked for",
            ),
            ("lorra", "unknown method 'lorra'; did you mean 'lora'?"),
            ({"rank": 4}, "a method needs a name, or parts of its own; found ['rank']"),
        ],
    )
    def test_bad_recipes(self, mlp, recipe, words):
        before = snapshot(mlp)
        with pytest.raises((SiteError, RecipeError)) as error:
            graft(mlp, recipe)
        assert words in str(error.value)
        unchanged(snapshot(mlp), before)

    def test_incompatible_kinds_of_two_grafts(self, mlp):
        graft(mlp, on("0", BOTTLENECK))
        before = snapshot(mlp)
        with pytest.raises(
            SiteError, match=r"kind 'magnitude' cannot go on '0' above kind 'bottleneck'.* Attach 'magnitude' first"
        ):
            graft(mlp, on("0", {"kind": "magnitude"}))
        unchanged(snapshot(mlp), before)

    def test_a_module_with_a_forward_of_its_own(self, mlp):
        mlp[0].forward = mlp[0].forward
        with pytest.raises(SiteError, match="has a forward of its own set on the instance"):
            graft(mlp, on("0", LOW_RANK))
        assert grafts(mlp) == []

    def test_a_failure_half_way_leaves_nothing_attached(self, mlp):
        mlp[2].forward = mlp[2].forward
        before = snapshot(mlp)
        with pytest.raises(SiteError):
            graft(mlp, on("*", LOW_RANK))
        unchanged(snapshot(mlp), before)

    def test_a_head_that_a_part_also_changes(self, bert):
        model, _ = bert
        before = snapshot(model)
        with pytest.raises(
            SiteError, match=r"'classifier' is a head, which is trained whole anyway: exclude it \(role: '!head'\)"
        ):
            graft(model, {"parts": [{"where": {"type": "linear"}, "what": LOW_RANK}]})
        unchanged(snapshot(model), before)

    @pytest.mark.parametrize(
        "use",
        [
            lambda g: g.merge(),
            lambda g: g.unmerge(),
            lambda g: g.detach(),
            lambda g: g.save("nowhere"),
            lambda g: g.model,
            lambda g: setattr(g, "enabled", False),
            lambda g: setattr(g, "scale", 0.5),
            lambda g: g.disabled().__enter__(),
        ],
    )
    def test_a_detached_graft(self, mlp, use):
        made = graft(mlp, on("0", LOW_RANK))
        made.detach()
        with pytest.raises(RecipeError, match=r"this graft was detached; attach a saved one with fg\.load"):
            use(made)

    def test_disabling_a_merged_graft(self, mlp):
        made = graft(mlp, on("0", LOW_RANK))
        made.merge()
        for attempt in (lambda: setattr(made, "enabled", False), lambda: made.disabled().__enter__()):
            with pytest.raises(RecipeError, match=r"the graft is merged: call unmerge\(\) before disabling it"):
                attempt()
        assert made.merged
        assert made.enabled

    def test_merging_above_what_is_not_merged(self, mlp):
        lower, upper = graft(mlp, on("0", LOW_RANK)), graft(mlp, on("0", {"kind": "scale-shift"}))
        with pytest.raises(NotMergeable, match="lies beneath on '0' and is not merged: merge it first, or disable it"):
            upper.merge()
        assert not upper.merged
        lower.merge()
        upper.merge()

    def test_merging_all_or_none(self, mlp):
        first, second = graft(mlp, on("0", LOW_RANK)), graft(mlp, on("2", BOTTLENECK))
        train(first)
        before = snapshot(mlp)
        with pytest.raises(NotMergeable, match="kind 'bottleneck' on '2' is no change of a weight"):
            merge(mlp)
        assert not first.merged
        assert grafts(mlp) == [first, second]
        unchanged(snapshot(mlp), before)

    def test_merging_a_model_without_grafts(self, mlp):
        with pytest.raises(RecipeError, match="no graft is on this model"):
            merge(mlp)

    def test_state_of_another_graft(self, mlp):
        made = graft(mlp, on("0", LOW_RANK))
        before = {name: tensor.clone() for name, tensor in made.state().items()}
        with pytest.raises(StoreError, match=r"state has other tensors: \['0/0\.0/a'"):
            made.load_state({"x": torch.ones(1)})
        with pytest.raises(StoreError, match=r"'0/0\.0/b' is \(1,\) in the state, \(8, 2\) here"):
            made.load_state({**before, "0/0.0/b": torch.ones(1)})
        assert all(torch.equal(tensor, before[name]) for name, tensor in made.state().items())

    def test_a_graft_that_was_never_trained_is_not_loaded(self, mlp, tmp_path):
        path = graft(mlp, on("0", LOW_RANK)).save(tmp_path / "graft")
        fresh = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        fresh.load_state_dict(
            {n.replace("finegraft.", ""): p for n, p in mlp.state_dict().items() if "finegraft" not in n}
        )
        before = snapshot(fresh)
        with pytest.raises(StoreError, match="the graft changes nothing, all its changes are zero"):
            load(path, fresh)
        unchanged(snapshot(fresh), before)


class TestHeads:
    def test_a_new_head_trains_whole_and_travels(self, bert, tmp_path):
        model, batch = bert
        made = graft(model, "lora", rank=2)
        train(made)
        expected = zoo.output(model(**batch))
        path = made.save(tmp_path / "graft")
        fresh, _ = zoo.build("bert")
        with torch.no_grad():
            fresh.classifier.weight.normal_()
        load(path, fresh)
        torch.testing.assert_close(zoo.output(fresh(**batch)), expected)

    def test_heads_none_leaves_it(self, bert):
        made = graft(bert[0], "lora", rank=2, heads="none")
        assert not any(slot.delta.kind == "replacement" for slot in made.all_slots)

    def test_heads_by_name(self, bert):
        made = graft(bert[0], "lora", rank=2, heads=["bert.pooler.dense"], role="q")
        assert [s.site for s in made.all_slots if s.delta.kind == "replacement"] == ["bert.pooler.dense"]

    def test_scale_does_not_reach_heads(self, bert):
        model, batch = bert
        made = graft(model, "head")
        train(made)
        before = zoo.output(model(**batch))
        made.scale = 0.0
        assert torch.equal(zoo.output(model(**batch)), before)


class TestTiedTensors:
    def test_counted_once_and_changed_everywhere(self):
        model, batch = zoo.build("llama-tied")
        table = model.model.embed_tokens.weight
        made = graft(model, on("model.embed_tokens", {"kind": "full"}))
        assert made.num_trainable == table.numel()
        train(made)
        before = zoo.output(model(**batch))
        made.merge()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(zoo.output(model(**batch)), before)

    def test_an_alias_is_named_by_its_site(self):
        model, _ = zoo.build("llama-tied")
        with pytest.raises(SiteError, match=r"shares its tensor with 'model\.embed_tokens', which is the site"):
            graft(model, on("lm_head", {"kind": "full"}))


class TestResolving:
    def test_every_form_of_a_method(self, tmp_path):
        by_name = resolve("lora", rank=3)
        assert resolve({"name": "lora", "rank": 3}) == by_name
        assert resolve(by_name) == by_name
        assert resolve(by_name.data()) == by_name
        (tmp_path / "mine.yaml").write_text(by_name.to_yaml())
        assert resolve(str(tmp_path / "mine.yaml")) == by_name
        assert isinstance(by_name, Recipe)

    def test_arguments_win_over_the_mapping(self):
        assert resolve({"name": "lora", "rank": 3}, rank=4).parts[0].what[0].rank == 4
