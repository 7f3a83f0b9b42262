"""Choosing units and sites: exact counts, the right scores, and budgets that cannot be met."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finegraft.errors import RecipeError, SiteError
from finegraft.grafting.make import graft
from finegraft.locate.find import sites
from finegraft.recipe import Select
from finegraft.registry import scores
from finegraft.select.choose import choose_sites, choose_units
from finegraft.select.gradients import gradient_sums
from tests.models import zoo
from tests.properties.zoo_bases import labelled


def a_site(out=6, into=8):
    torch.manual_seed(0)
    (site,) = sites(nn.Sequential(nn.Linear(into, out))).where(type="linear")
    return site


def rng():
    return torch.Generator().manual_seed(0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(["entry", "row", "column"]),
    st.sampled_from(["random", "magnitude", "low-rank-magnitude"]),
    st.floats(0.001, 1.0),
)
def test_density_gives_exact_counts(unit, score, density):
    site = a_site()
    units = {"entry": 48, "row": 6, "column": 8}[unit]
    found = choose_units(site, Select(unit=unit, score=score, density=density), rng())
    assert len(found) == max(1, round(density * units))
    assert torch.equal(found, found.unique()), "sorted, without repeats"
    assert found.min() >= 0
    assert found.max() < units


def test_counts_and_budgets_like_a_rank():
    site = a_site()
    assert len(choose_units(site, Select(unit="row", count=5), rng())) == 5
    assert len(choose_units(site, Select(unit="entry", like_rank=2), rng())) == 2 * (6 + 8)
    assert len(choose_units(site, Select(unit="entry", like_rank=100), rng())) == 48


def test_more_than_there_is():
    with pytest.raises(SiteError, match="'0' has 6 of unit 'row'; 7 were asked for"):
        choose_units(a_site(), Select(unit="row", count=7), rng())


def test_magnitude_takes_the_largest_or_smallest():
    site = a_site()
    size = site.weight.abs()
    entries = choose_units(site, Select(unit="entry", score="magnitude", count=5), rng())
    assert size.flatten()[entries].min() == size.flatten().sort().values[-5]
    smallest = choose_units(site, Select(unit="entry", score="magnitude", count=5, largest=False), rng())
    assert size.flatten()[smallest].max() == size.flatten().sort().values[4]
    columns = choose_units(site, Select(unit="column", score="magnitude", count=3), rng())
    assert columns.tolist() == sorted(size.sum(0).topk(3).indices.tolist())
    rows = choose_units(site, Select(unit="row", score="magnitude", count=2), rng())
    assert rows.tolist() == sorted(size.sum(1).topk(2).indices.tolist())


def test_low_rank_magnitude_sees_the_principal_part_only():
    site = a_site()
    with torch.no_grad():
        principal = 5 * torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 9))
        site.parameter.copy_(principal + 0.1 * torch.randn(6, 8, generator=rng()))
    found = scores["low-rank-magnitude"](site, Select(unit="entry", count=1, filter_rank=1), rng(), None)
    torch.testing.assert_close(found, principal, atol=0.4, rtol=0)


def test_the_seed_decides_random_choices():
    select = Select(unit="entry", density=0.3)
    first, again = (choose_units(a_site(), select, rng()) for _ in range(2))
    other = choose_units(a_site(), select, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class TestSites:
    def test_half_of_each_blocks_attention_and_ffn(self):
        model, _ = zoo.build("llama")
        matrices = list(sites(model).where(type="linear", role="!lm_head"))
        chosen = choose_sites(matrices, Select(unit="module", density=0.5), rng())
        for layer in (0, 1):
            attention = [s for s in chosen if s.layer == layer and s.role in ("q", "k", "v", "o")]
            assert len(attention) == 2
        feed_forward = [s for s in chosen if s.role in ("up", "gate", "down")]
        assert len(feed_forward) == 3, "half of three, made up over the blocks: one and two"

    def test_density_below_one_site(self):
        model, _ = zoo.build("llama")
        with pytest.raises(SiteError, match=r"density 0\.001 of 14 sites is less than one site"):
            choose_sites(
                list(sites(model).where(type="linear", role="!lm_head")), Select(unit="module", density=0.001), rng()
            )

    @pytest.mark.parametrize("settings", [{"count": 2}, {"score": "magnitude", "density": 0.5}])
    def test_only_random_shares_of_sites(self, settings):
        with pytest.raises(SiteError, match="unit 'module' takes score 'random' and a density"):
            choose_sites([a_site()], Select(unit="module", **settings), rng())


class TestGradients:
    def test_sums_of_absolute_gradients_and_an_untouched_model(self):
        model, batch = labelled("bert")
        model.train()
        model.classifier.weight.requires_grad_(False)
        chosen = list(sites(model).where(role="q"))
        flags = [p.requires_grad for p in model.parameters()]
        found = gradient_sums(model, chosen, [batch, batch])
        assert model.training
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters())

        model.eval()
        query = model.bert.encoder.layer[0].attention.self.query
        (expected,) = torch.autograd.grad(model(**batch).loss, [query.weight])
        torch.testing.assert_close(found[chosen[0].name], 2 * expected.abs())

    def test_scores_from_gradients(self):
        site, gradient = a_site(), torch.rand(6, 8)
        assert torch.equal(scores["gradient"](site, None, None, gradient), gradient)
        assert torch.equal(scores["sensitivity"](site, None, None, gradient), site.weight.abs() * gradient)

    @pytest.mark.parametrize(
        ("calibration", "words"),
        [
            (None, "needs data: give calibration="),
            ([], "calibration is empty"),
            ([torch.ones(2)], "must be a mapping for model"),
        ],
    )
    def test_calibration_that_is_of_no_use(self, calibration, words):
        model, _ = zoo.build("bert")
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(RecipeError, match=words):
            graft(model, "gradient-sparse", calibration=calibration)
        assert [p.requires_grad for p in model.parameters()] == flags

    def test_a_batch_without_labels(self):
        model, batch = zoo.build("bert")
        with pytest.raises(
            RecipeError, match=r"gives no loss for a calibration batch with \['attention_mask', 'input_ids'\]"
        ):
            graft(model, "gradient-sparse", calibration=[batch])
