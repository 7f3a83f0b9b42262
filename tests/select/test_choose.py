"""Choosing units: exact counts, the right ones, ties, coupled sites, and budgets that cannot be met."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finegraft.errors import RecipeError, SiteError
from finegraft.grafting.make import graft
from finegraft.locate.find import sites
from finegraft.recipe import Select
from finegraft.select.choose import choose, select_units
from finegraft.select.ranking import Leaders, best, best_of_rows
from finegraft.select.units import Units
from tests.models import zoo
from tests.properties.zoo_bases import labelled
from tests.select.bases import Regression, a_site, batches, layers, rng


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(["entry", "row", "column", "block"]),
    st.sampled_from(["random", "magnitude", "low-rank-magnitude"]),
    st.floats(0.001, 1.0),
)
def test_density_gives_exact_counts(unit, score, density):
    site = a_site()
    units = {"entry": 48, "row": 6, "column": 8, "block": 6}[unit]
    select = Select(unit=unit, score=score, density=density, block=3)
    found = choose([site], select, seed=0, part=0)["0"]
    assert len(found) == max(1, round(density * units))
    assert Units(unit, found, 3).flaw((6, 8)) is None


class TestRanking:
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 30), st.booleans())
    def test_of_equal_scores_the_first(self, values, count, largest):
        count = min(count, len(values))
        order = sorted(range(len(values)), key=lambda i: (-values[i] if largest else values[i], i))
        assert best(torch.tensor(values).float(), count, largest=largest).tolist() == sorted(order[:count])

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6), st.booleans())
    def test_of_each_row(self, rows, count, seed, largest):
        found = torch.randint(0, 4, (rows, 5), generator=rng(seed)).float()
        expected = [i * 5 + j for i in range(rows) for j in best(found[i], count, largest=largest).tolist()]
        assert best_of_rows(found, count, largest=largest).tolist() == expected

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.permutations(range(6)), st.integers(1, 40), st.integers(0, 10**6), st.booleans())
    def test_pieces_in_any_order_lead_to_the_same(self, order, count, seed, largest):
        found = torch.randint(0, 9, (42,), generator=rng(seed)).float()
        leaders = Leaders(count, largest=largest)
        for piece in order:
            leaders.add(found[piece * 7 : piece * 7 + 7], piece * 7)
        ranked = leaders.ranked()
        assert torch.equal(ranked.sort().values, best(found, count, largest=largest))
        scores = found[ranked] if largest else -found[ranked]
        assert bool((scores[1:] <= scores[:-1]).all())


def test_magnitude_takes_the_largest_or_smallest():
    site = a_site()
    size = site.weight.abs()

    def chosen(**select):
        return choose([site], Select(score="magnitude", **select), seed=0, part=0)["0"]

    assert size.flatten()[chosen(unit="entry", count=5)].min() == size.flatten().sort().values[-5]
    assert size.flatten()[chosen(unit="entry", count=5, largest=False)].max() == size.flatten().sort().values[4]
    assert chosen(unit="column", count=3).tolist() == sorted(size.sum(0).topk(3).indices.tolist())
    assert chosen(unit="row", count=2).tolist() == sorted(size.sum(1).topk(2).indices.tolist())
    tiles = torch.nn.functional.pad(size, (0, 1, 0, 0)).view(2, 3, 3, 3).sum((1, 3)).flatten()
    assert chosen(unit="block", block=3, count=2).tolist() == sorted(tiles.topk(2).indices.tolist())


def test_every_row_has_its_own_best():
    site = a_site()
    found = choose([site], Select(unit="entry", score="magnitude", count=2, scope="row"), seed=0, part=0)["0"]
    best_two = site.weight.abs().topk(2).indices.sort().values
    assert torch.equal(found.view(6, 2) % 8, best_two)
    everything = choose([site], Select(unit="entry", score="magnitude", count=9, scope="row"), seed=0, part=0)["0"]
    assert len(everything) == 48, "of rows shorter than count all entries"


def test_wandas_share_of_each_row_is_exact():
    model, data = Regression(), batches()
    select = Select(unit="entry", score="activation", density=0.5, scope="row")
    found = choose(layers(model), select, seed=0, part=0, model=model, batches=data)
    for layer in layers(model):
        rows = torch.bincount(found[layer.name] // layer.fan_in, minlength=layer.fan_out)
        assert rows.tolist() == [layer.fan_in // 2] * layer.fan_out


def test_thresholds():
    model = Regression()
    with torch.no_grad():
        model.steps[1].weight.clamp_(min=0.05)
        model.steps[0].weight[0, :3] = 0.001
    found = choose(
        layers(model), Select(unit="entry", score="magnitude", threshold=0.01, largest=False), seed=0, part=0
    )
    for layer in layers(model):
        expected = (layer.weight.abs() < 0.01).flatten().nonzero().flatten()
        assert torch.equal(found.get(layer.name, torch.empty(0, dtype=torch.int64)), expected)
    assert "steps.1" not in found, "nothing there passes"
    with pytest.raises(SiteError, match=r"no entry has a score 'magnitude' over 99; the largest is 0\.\d+"):
        choose(layers(model), Select(unit="entry", score="magnitude", threshold=99), seed=0, part=0)
    with pytest.raises(SiteError, match=r"no entry has a score 'magnitude' under 1e-09; the smallest is"):
        choose(layers(model), Select(unit="entry", score="magnitude", threshold=1e-9, largest=False), seed=0, part=0)


class TestAcrossTheModel:
    def test_entries(self):
        model, data = Regression(), batches()
        select = Select(unit="entry", score="gradient", count=30, scope="model")
        found = choose(layers(model), select, seed=0, part=0, model=model, batches=data)
        model(**data[0])["loss"].backward()
        sizes = {f"steps.{i}": step.weight.grad.abs().flatten() for i, step in enumerate(model.steps)}
        last = torch.cat(list(sizes.values())).sort().values[-30]
        for name, size in sizes.items():
            expected = (size >= last).nonzero().flatten()
            assert torch.equal(found.get(name, torch.empty(0, dtype=torch.int64)), expected)

    def test_equal_scores_are_taken_in_the_order_of_sites(self):
        model = Regression()
        with torch.no_grad():
            for step in model.steps:
                step.weight.fill_(1.0)
        select = Select(unit="entry", score="magnitude", count=100, scope="model")
        found = choose(layers(model), select, seed=0, part=0)
        assert {name: index.tolist() for name, index in found.items()} == {
            "steps.0": list(range(96)),
            "steps.1": list(range(4)),
        }

    def test_a_site_that_gets_nothing_is_left_out(self):
        model = Regression()
        with torch.no_grad():
            model.steps[1].weight.mul_(1e-6)
        part = {
            "where": {"name": "steps.*"},
            "what": "sparse",
            "select": {"unit": "entry", "score": "magnitude", "density": 0.1, "scope": "model"},
        }
        made = graft(model, {"parts": [part]})
        assert [p.site.name for p in made.placements] == ["steps.0", "steps.2"]
        assert made.left_out == ("steps.1",)
        assert "left out, as nothing in them was chosen: steps.1" in made.report
        assert f"entries chosen: other {made.num_trainable} of 136" in made.report

    def test_the_report_names_sites_that_got_another_change_instead(self):
        part = {
            "where": {"name": "steps.*"},
            "what": "sparse",
            "select": {"unit": "entry", "score": "magnitude", "density": 0.3},
            "instead": {"what": {"kind": "low-rank", "rank": 1}, "share": 0.9},
        }
        made = graft(Regression(), {"parts": [part]})
        other = [p.site.name for p in made.placements if p.slots[0].delta.kind == "low-rank"]
        assert 0 < len(other) < 3
        assert f"by another kind instead, as much of them was chosen: {', '.join(other)}" in made.report

    def test_draws_are_over_all_sites_together(self):
        model, _ = zoo.build("bert")
        places = list(sites(model).where(role="down"))
        select = Select(unit="channel", density=0.25, scope="model")
        counts = set()
        for seed in range(6):
            found = choose(places, select, seed=seed, part=0)
            assert sum(map(len, found.values())) == 24, "a quarter of twice 48"
            counts.add(tuple(len(index) for index in found.values()))
        assert len(counts) > 1, "shares of blocks differ"

    def test_the_order_in_which_layers_stand_does_not_matter(self):
        """SMT: choosing blocks is invariant to the order of layers."""
        model, data = Regression(), batches(2)
        select = Select(unit="block", block=4, score="gradient-sum", density=0.3, scope="model")
        found = choose(layers(model), select, seed=0, part=0, model=model, batches=data)
        turned = choose(layers(model)[::-1], select, seed=0, part=0, model=model, batches=data)
        assert found.keys() == turned.keys()
        assert all(torch.equal(index, turned[name]) for name, index in found.items())


class TestCoupled:
    @pytest.mark.parametrize("scope", ["tensor", "model"])
    @pytest.mark.parametrize("score", ["random", "magnitude", "gradient", "activation"])
    def test_sites_of_a_block_choose_the_same(self, score, scope):
        model, batch = labelled("llama")
        places = list(sites(model).where(role=["q", "k", "v", "o", "up", "gate", "down"]))
        heads = Select(unit="head", score=score, density=0.5, scope=scope)
        channels = Select(unit="channel", score=score, density=0.5, scope=scope)
        own = {"model": model, "batches": [batch], "seed": 3, "part": 0}
        found = choose([p for p in places if p.coupling.unit == "head"], heads, **own)
        found |= choose([p for p in places if p.coupling.unit == "channel"], channels, **own)
        for layer in (0, 1):
            chosen = {p.role: found[p.name].tolist() for p in places if p.layer == layer and p.name in found}
            assert chosen.get("up") == chosen.get("gate") == chosen.get("down")
            assert chosen.get("q") == chosen.get("o"), "two query heads of 8, contiguous"
            assert chosen.get("k") == chosen.get("v")
            units = sorted({line // 16 for line in chosen.get("q", [])})
            assert units == sorted({line // 8 for line in chosen.get("k", [])}), "key heads with their query heads"

    def test_scores_are_summed_over_the_sites_of_a_block(self):
        model, _ = zoo.build("bert")
        places = [p for p in sites(model) if p.coupling is not None and p.coupling.unit == "head" and p.layer == 1]
        sums = sum((p.weight.abs().sum(0 if p.role == "o" else 1)).view(4, 8).sum(1) for p in places)
        found = choose(places, Select(unit="head", score="magnitude", count=1), seed=0, part=0)
        first = int(sums.argmax()) * 8
        assert all(index.tolist() == list(range(first, first + 8)) for index in found.values())

    def test_one_site_alone_is_chosen_by_itself(self):
        model, _ = zoo.build("bert")
        (place, *_) = sites(model).where(role="down")
        found = choose([place], Select(unit="channel", score="magnitude", count=5), seed=0, part=0)[place.name]
        assert found.tolist() == sorted(place.weight.abs().sum(0).topk(5).indices.tolist())

    def test_more_heads_than_there_are(self):
        model, _ = zoo.build("llama")
        with pytest.raises(SiteError, match=r"'model.layers.0.self_attn' has 2 of unit 'head'; 3 were asked for"):
            graft(
                model,
                {"parts": [{"where": {"role": "o"}, "what": "sparse", "select": {"unit": "head", "count": 3}}]},
            )

    def test_a_role_that_has_no_heads(self):
        model, _ = zoo.build("bert")
        part = {"where": {"role": "up"}, "what": "sparse", "select": {"unit": "head", "count": 1}}
        with pytest.raises(SiteError, match="unit 'head' is for linear layers of roles q, k, v, o, qkv in a block"):
            graft(model, {"parts": [part]})


class TestOneSite:
    def test_by_a_statistic(self):
        gradient = torch.rand(6, 8, generator=rng())
        found = select_units(a_site(), Select(unit="entry", score="gradient", count=5), rng(), gradient)
        assert found.tolist() == sorted(gradient.flatten().topk(5).indices.tolist())
        with pytest.raises(RecipeError, match="score 'gradient' needs the statistic 'absolute' of '0'"):
            select_units(a_site(), Select(unit="entry", score="gradient", count=5), rng())

    def test_as_many_as_are_asked_for(self):
        select = Select(unit="entry", score="magnitude", parameters=1000, scope="model")
        assert len(select_units(a_site(), select, rng(), count=7)) == 7
        with pytest.raises(RecipeError, match="does not say how many units of '0' train: give count"):
            select_units(a_site(), select, rng())

    def test_the_generator_decides_draws(self):
        select = Select(unit="entry", density=0.3)
        first, again, other = (select_units(a_site(), select, rng(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
