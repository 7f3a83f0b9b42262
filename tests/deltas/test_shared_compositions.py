"""Sums and products of kinds, changes weighed by sample, and adapters of other make."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finegraft as fg
from finegraft.deltas.basis_low_rank import orthogonal_rows
from finegraft.deltas.random_features import features
from finegraft.errors import RecipeError, SiteError
from finegraft.grafting.graft import Graft
from finegraft.registry import kinds
from tests.deltas.structured import IN, OUT, close, site_of, small_linear, trained
from tests.deltas.test_shared_factors import LAYERS, WIDTH, X, stack
from tests.models import zoo


def noisy(graft: Graft, seed: int = 1) -> Graft:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return graft


def on_layers(model: nn.Module, *what: dict[str, Any]) -> Graft:
    return fg.graft(model, {"parts": [{"where": {"type": "linear"}, "what": list(what)}], "heads": "none"})


class TestGlora:
    def test_is_the_formula_of_the_paper(self):
        layer = nn.Linear(IN, OUT).double()
        model = nn.ModuleDict({"site": layer})
        w, b = layer.weight.detach().clone(), layer.bias.detach().clone()
        graft = noisy(on_layers(model, {"kind": "bias-map"}, {"kind": "low-rank-gain"}, {"kind": "low-rank"}))
        tuned, gain, added = graft.all_slots
        x = torch.randn(5, IN).double()
        weight = w * (1 + gain.b @ gain.a) + added.delta.scale * added.b @ added.a
        bias = b + b * tuned.d + tuned.e + w @ tuned.c
        expected = x @ weight.t() + bias
        close(layer(x), expected)
        graft.merge()
        close(layer.weight, weight)
        close(layer.bias, bias)
        graft.unmerge()
        assert torch.equal(layer.weight, w)
        assert torch.equal(layer.bias, b)

    def test_a_layer_without_a_bias_gets_one(self):
        layer = nn.Linear(IN, OUT, bias=False).double()
        graft = noisy(on_layers(nn.ModuleDict({"site": layer}), {"kind": "bias-map", "rank": 2}))
        (slot,) = graft.all_slots
        x = torch.randn(5, IN).double()
        expected = x @ layer.weight.t() + slot.e + layer.weight @ (slot.c_up @ slot.c)
        close(layer(x), expected)
        graft.merge()
        close(layer(x), expected)

    def test_merges_below_another_that_reads_the_weight(self):
        model = nn.ModuleDict({"site": nn.Linear(IN, OUT).double()})
        for what in ({"kind": "low-rank-gain"}, {"kind": "bias-map"}):
            noisy(on_layers(model, what))
        x = torch.randn(5, IN).double()
        expected = model["site"](x)
        close(fg.merge(model)["site"](x), expected)


class TestRelaxedRecursive:
    def grafted(self, model: nn.Module, **settings: Any) -> Graft:
        part = {"where": {"type": "linear", "role": ["q", "up"]}, "what": {"kind": "tied", **settings}}
        return fg.graft(model, {"parts": [part], "heads": "none"})

    def test_a_whole_rank_starts_as_the_base(self):
        model, batch = zoo.build("llama")
        expected = zoo.output(model(**batch))
        self.grafted(model, blocks=1, rank=32)
        close(zoo.output(model(**batch)), expected, 1e-4)

    def test_tied_blocks_have_the_mean_and_their_differences(self):
        model, _ = zoo.build("llama")
        depth = model.config.num_hidden_layers
        sites = [site for site in fg.sites(model).where(type="linear", role=["q", "up"])]
        graft = self.grafted(model, blocks=1, rank=2)
        numbers = sum(math.prod(site.shape) for site in sites) // depth
        assert graft.num_trainable == numbers + sum(2 * sum(site.shape) for site in sites)
        first, second = (slot for slot in graft.all_slots if "q_proj" in slot.site)
        assert first.common is second.common
        weights = [site.weight for site in sites if site.role == "q"]
        close(first.common, torch.stack(weights).mean(0), 1e-5)
        left = torch.linalg.matrix_norm(weights[0] - first.common - first.b @ first.a)
        values = torch.linalg.svdvals(weights[0] - first.common)
        close(left, values[2:].square().sum().sqrt(), 1e-4)

    def test_tying_alone(self):
        model, _ = zoo.build("llama")
        graft = self.grafted(model, blocks=1, rank=0)
        weight = [slot.delta.weight(slot, torch.zeros(slot.common.shape)) for slot in graft.all_slots]
        assert torch.equal(weight[0], weight[2])
        apart = self.grafted(zoo.build("llama")[0], blocks=8, rank=0)
        assert not any(slot.borrowed for slot in apart.all_slots)


class TestSampleWeights:
    def mixed(self, experts: Any = 2) -> tuple[nn.Module, Graft]:
        model = stack()
        return model, noisy(on_layers(model, {"kind": "low-rank-mixture", "experts": experts}))

    def test_each_sample_takes_what_it_weighs(self):
        model, graft = self.mixed()
        alone = []
        for expert in range(2):
            twin = stack()
            own = on_layers(twin, {"kind": "low-rank", "rank": 4, "alpha": 4.0})
            with torch.no_grad():
                for slot, whole in zip(own.all_slots, graft.all_slots, strict=True):
                    slot.a.copy_(whole.a[expert])
                    slot.b.copy_(whole.b[expert])
            alone.append(twin(X))
        with fg.weigh(graft, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])):
            y = model(X)
            with_tokens = model(X.unsqueeze(1).expand(4, 3, WIDTH))
        close(y, torch.stack([alone[i % 2][i] for i in range(4)]), 1e-5)
        close(with_tokens, y.unsqueeze(1).expand(4, 3, WIDTH), 1e-5)

    def test_equal_weights_are_what_a_merge_stands_for(self):
        model, graft = self.mixed()
        expected = model(X)
        with fg.weigh(graft, torch.full((4, 2), 0.5)):
            close(model(X), expected, 1e-5)
        graft.merge()
        close(model(X), expected, 1e-5)
        with pytest.raises(RecipeError, match="merged"), fg.weigh(graft, torch.ones(4, 2)):
            pass

    def test_a_task_reaches_its_own_change_alone(self):
        model, graft = self.mixed(("depth", "edges", "parts"))
        graft.task = "edges"
        model(X).square().sum().backward()
        for slot in graft.all_slots:
            assert [bool(g.any()) for g in slot.b.grad] == [False, True, False]
        expected = model(X)
        graft.task = ["edges", "depth", "edges", "parts"]
        close(model(X)[::2], expected[::2], 1e-5)
        assert not torch.allclose(model(X)[1], expected[1])

    def test_no_one_weight_stands_for_samples_that_differ(self):
        model, graft = self.mixed(("depth", "edges"))
        graft.task = ["edges", "depth", "edges", "depth"]
        expected = model(X)
        with pytest.raises(RecipeError, match="set one task for all"):
            graft.merge()
        assert torch.equal(model(X), expected)
        model = stack()
        graft = on_layers(model, {"kind": "low-rank-mixture"}, {"kind": "magnitude"})
        with pytest.raises(RecipeError, match="no one weight expresses"), fg.weigh(graft, torch.ones(4, 2)):
            model(X)

    def test_gradients_reach_the_weights(self):
        model, graft = self.mixed()
        weights = torch.rand(4, 2, requires_grad=True)
        with fg.weigh(graft, weights):
            model(X).sum().backward()
        assert weights.grad is not None
        assert weights.grad.abs().min() > 0

    def test_weights_that_do_not_fit_are_refused(self):
        model, graft = self.mixed()
        for weights in (torch.ones(4, 3), torch.ones(4), torch.ones(4, 2).long(), torch.ones(0, 2), [[1.0, 0.0]], None):
            with pytest.raises(RecipeError, match=r"\(samples, 2\)"), fg.weigh(graft, weights):
                pass
        with pytest.raises(RecipeError, match="3 samples"), fg.weigh(graft, torch.ones(3, 2)):
            model(X)
        with pytest.raises(RecipeError, match="routed"), fg.route(model, [graft]), fg.weigh(graft, torch.ones(1, 2)):
            pass
        with pytest.raises(RecipeError, match="weighed"), fg.weigh(graft, torch.ones(1, 2)), fg.route(model, [graft]):
            pass
        with pytest.raises(RecipeError, match="weighs nothing"), fg.weigh(on_layers(model, {"kind": "bias"}), X):
            pass

    def test_mtlora_has_the_numbers_of_its_sheet(self):
        graft = fg.graft(stack(), "mtlora", rank=3, experts=["a", "b"], heads="none")
        assert graft.num_trainable == LAYERS * 3 * 2 * WIDTH * (1 + 2)


class TestOrthogonalAdaptation:
    def test_concepts_of_one_seed_read_orthogonal_inputs(self):
        rows = orthogonal_rows(IN, range(IN), 3)
        close(rows @ rows.t(), torch.eye(IN).double())
        close(orthogonal_rows(IN, range(4, 9), 3), rows[4:9])
        assert (orthogonal_rows(IN, range(IN), 4) - rows).abs().max() > 0.1

    def test_a_sum_of_concepts_lets_none_disturb_another(self):
        site = small_linear()
        both = [kinds["basis-low-rank"](rank=3, concept=concept) for concept in (0, 2)]
        first, second = ((delta, trained(delta, site)) for delta in both)
        x = first[1].a.t() @ torch.randn(3, 5).double()  # what the first concept reads
        assert both[0].count(site) == 3 * OUT
        w = site.weight
        close(second[0].weight(second[1], w) @ x, w @ x)
        one, other = (d.weight(p, e.weight(q, w)) for (d, p), (e, q) in ((first, second), (second, first)))
        close(one, other)

    def test_more_concepts_than_inputs_are_refused(self):
        with pytest.raises(SiteError, match="hold 6 concepts of rank 4"):
            kinds["basis-low-rank"](rank=4, concept=6).fits(small_linear())


class TestFlatButterfly:
    @pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 8), (16, 8)])
    def test_density(self, rows, columns):
        site = site_of(nn.Linear(columns * 4, rows * 4))
        size = min(rows, columns)
        for factors in range(int(math.log2(size)) + 1):
            delta = kinds["flat-butterfly"](block=4, factors=factors)
            blocks = rows * columns * (1 + factors) // size
            assert delta.count(site) == blocks * 16
            support = delta.change(trained(delta, site)) != 0
            assert support.sum() == blocks * 16
            per_row = support.view(rows, 4, columns, 4)[:, 0, :, 0].sum(1)
            assert (per_row == columns * (1 + factors) // size).all()

    def test_all_factors_are_the_supports_of_a_butterfly_together(self):
        delta, site = kinds["flat-butterfly"](block=1, factors=3), site_of(nn.Linear(8, 8))
        support = delta.change(trained(delta, site)) != 0
        expected = torch.eye(8, dtype=torch.bool)
        for stride in (1, 2, 4):
            pairs = torch.arange(8)
            expected[pairs, pairs ^ stride] = True
        assert torch.equal(support, expected)


class TestRandomFeatures:
    def test_inner_products_are_those_of_the_arc_cosine_kernel(self):
        rng = torch.Generator().manual_seed(0)
        x, y = torch.randn(2, 4, generator=rng).double()
        directions = torch.randn(200_000, 5, generator=rng).double()
        u, v = (torch.cat([z, torch.ones(1).double()]) for z in (x, y))
        angle = torch.acos(u @ v / (u.norm() * v.norm()))
        kernel = u.norm() * v.norm() * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
        close(features(x, directions) @ features(y, directions), kernel, 0.03)

    def test_the_count_does_not_depend_on_the_width_of_the_input(self):
        delta = kinds["random-features"](features=5, placement="parallel")
        counts = {delta.count(site_of(nn.Linear(width, 12))) for width in (4, 40)}
        assert counts == {12 * 6}


def test_domain_modulation_scales_columns_of_the_weight():
    site = small_linear()
    delta = kinds["scale-shift"](side="in")
    p = trained(delta, site)
    close(delta.weight(p, site.weight), site.weight @ torch.diag(1 + p.scale))
    assert delta.count(site) == IN


def test_the_change_of_a_part_is_a_tensor(tmp_path):
    """What methods of this file save is what they train."""
    graft = noisy(fg.graft(stack(), "pixelated-butterfly", rank=2, block=4, heads="none"))
    other = stack()
    loaded = fg.load(graft.save(tmp_path / "graft"), other)
    assert loaded.num_trainable == graft.num_trainable
    y: Tensor = other(X)
    close(y, graft.model(X), 1e-6)


def test_an_adapter_of_tensor_trains_has_the_numbers_of_its_trains():
    site = site_of(nn.Linear(24, 48))
    delta = kinds["bottleneck"](width=6, projection="tensor-train", projection_rank=5)
    down, up = (5 * first + 25 * second + 5 * third for first, second, third in ((6, 12, 4), (12, 4, 6)))
    assert delta.count(site) == down + up + 6 + 48
