"""Starts that look at calibration data, against their papers and PEFT."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

import finegraft as fg
from finegraft.errors import RecipeError, SiteError
from finegraft.grafting.graft import Graft
from finegraft.locate.find import sites
from finegraft.registry import inits
from finegraft.select import streaming
from finegraft.testing.base_models import Classifier, Sandwich

OUT, IN, RANK, SCALE = 12, 10, 3, 2.0


def site_with(statistic=None):
    torch.manual_seed(0)
    (found,) = sites(nn.Sequential(nn.Linear(IN, OUT))).where(type="linear")
    return replace(found, statistic=statistic)


def covariance():
    x = torch.randn(200, IN, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.3, 2, IN)
    return x.T @ x / 200


def start(name, site):
    return inits[name](site, RANK, SCALE, torch.Generator())


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    model = Classifier(8, 12, 2, depth=2, classes=3)
    batches = [
        {
            "ids": torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(i)),
            "labels": torch.tensor([0, 1, 2, 0]),
        }
        for i in range(2)
    ]
    return model, batches


class TestCorda:
    @pytest.mark.parametrize(("name", "kept"), [("corda-ipm", slice(RANK, None)), ("corda-kpm", slice(None, -RANK))])
    def test_what_stays_has_the_other_singular_values(self, name, kept):
        c = covariance()
        site = site_with(c)
        a, b = start(name, site)
        damped = c + 0.01 * c.diagonal().mean() * torch.eye(IN)
        values = torch.linalg.svdvals(site.weight @ damped)
        left = torch.linalg.svdvals((site.weight - SCALE * b @ a) @ damped)
        torch.testing.assert_close(left[: IN - RANK], values[kept], atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("method", ["ipm", "kpm"])
    def test_factors_are_those_of_peft(self, method, monkeypatch):
        monkeypatch.setitem(sys.modules, "attr", dataclasses)  # PEFT takes its dataclass from there
        from peft.tuners.lora.corda import collect_eigens_for_layer

        c = covariance()
        site = site_with(c)
        a, b = start(f"corda-{method}", site)
        linear = nn.Linear(IN, OUT)
        linear.weight.data, linear.covariance_matrix = site.weight.clone(), c
        linear.eigens = collect_eigens_for_layer(linear, None)
        chosen = slice(0, RANK) if method == "ipm" else slice(-RANK, None)
        eigens = linear.eigens
        eigens.S_WC, eigens.U_WC, eigens.V_WC = eigens.S_WC[chosen], eigens.U_WC[:, chosen], eigens.V_WC[:, chosen]
        config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method=method))
        twin = PeftLinear(linear, "default", config, r=RANK, lora_alpha=int(SCALE * RANK))
        theirs_a, theirs_b = (getattr(twin, f"lora_{n}")["default"].weight.detach() for n in "AB")
        torch.testing.assert_close(a.abs(), theirs_a.abs(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(b @ a, theirs_b @ theirs_a, atol=1e-5, rtol=1e-4)

    def test_covariances_are_means_over_samples_each_divided_by_its_largest_number(self, classifier):
        model, batches = classifier
        found = list(sites(model).where(role="up"))
        seen = []
        found[0].module.register_forward_hook(lambda module, args, y: seen.append(args[0].detach()))
        got = {}
        streaming.totals(model, found, batches, "covariance", lambda site, total: got.setdefault(site.name, total))
        rows = [x / x.max().abs() for batch in seen[:2] for x in batch]
        torch.testing.assert_close(got[found[0].name], sum(x.T @ x for x in rows) / len(rows))

    def test_it_goes_on_linear_layers(self):
        with pytest.raises(SiteError, match="looks at inputs of linear layers"):
            fg.graft(
                nn.Sequential(nn.Conv2d(3, 4, 1)),
                {"parts": [{"where": {"type": "conv"}, "what": {"kind": "low-rank", "init": "corda-ipm", "rank": 1}}]},
                calibration=[],
            )


class TestLoraGa:
    def test_factors_are_those_of_peft_but_for_signs(self):
        torch.manual_seed(2)
        gradient = torch.randn(OUT, 4) @ torch.diag(torch.tensor([8.0, 4, 2, 1])) @ torch.randn(4, IN)
        site = site_with(gradient)
        a, b = inits["lora-ga"](site, 2, SCALE, torch.Generator())
        linear = nn.Linear(IN, OUT)
        linear._peft_loraga_grad = gradient
        config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        twin = PeftLinear(linear, "default", config, r=2, lora_alpha=int(SCALE * 2))
        for name, own in (("A", a), ("B", b)):
            theirs = getattr(twin, f"lora_{name}")["default"].weight.detach()
            torch.testing.assert_close(own.abs(), theirs.abs(), atol=1e-4, rtol=1e-3)

    def test_ranks_beyond_half_the_layer_say_so(self):
        with pytest.raises(SiteError, match="two singular vectors of the gradient for each rank"):
            inits["lora-ga"](site_with(torch.randn(OUT, IN)), 6, SCALE, torch.Generator())


class TestLoraSb:
    def test_it_takes_the_nearest_first_step(self, classifier):
        model, batches = classifier
        weight = model.layers[0].mlp.up_proj.weight
        loss = sum(model(**batch)["loss"] for batch in batches)
        step = -0.01 * torch.autograd.grad(loss, weight)[0].sign()
        graft = fg.graft(model, "lora-sb", rank=RANK, alpha=6.0, step=0.01, calibration=batches)
        slot = next(s for s in graft.all_slots if s.site == "layers.0.mlp.up_proj")
        change = slot.delta.weight(slot, torch.zeros_like(weight))
        values = torch.linalg.svdvals(step)
        torch.testing.assert_close((change - step).norm(), values[RANK:].square().sum().sqrt())
        torch.testing.assert_close(slot.a @ slot.a.T, torch.eye(RANK))
        torch.testing.assert_close(slot.b.T @ slot.b, torch.eye(RANK))
        assert slot.delta.count(sites(model)["layers.0.mlp.up_proj"]) == RANK**2

    def test_the_core_gets_the_gradient_between_its_factors(self):
        torch.manual_seed(0)
        model = Sandwich(nn.Linear(6, IN), nn.Linear(IN, OUT), nn.Linear(OUT, 2))
        x = torch.randn(7, 6)

        class WithLoss(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                return {"loss": self.model(x).square().sum()}

        whole = WithLoss()
        recipe = {
            "parts": [
                {
                    "where": {"name": "model.site"},
                    "what": {"kind": "core", "rank": 3, "alpha": 3.0, "factors_from": "gradient"},
                }
            ],
            "heads": "none",
        }
        graft = fg.graft(whole, recipe, calibration=[{"x": x}])
        whole(x)["loss"].backward()
        (slot,) = graft.all_slots
        merged = graft.merge() or model.site.weight.detach().clone().requires_grad_()
        bias = model.site.bias
        y = torch.nn.functional.linear(model.before(x), merged, bias)
        (g,) = torch.autograd.grad(model.after(torch.tanh(y)).square().sum(), merged)
        torch.testing.assert_close(slot.core.grad, slot.b.T @ g @ slot.a.T)


def test_totals_are_the_same_in_one_turn_or_many(classifier, monkeypatch):
    model, batches = classifier
    found = list(sites(model).where(type="linear", role=["q", "up"]))
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))

    def collect():
        got = {}
        streaming.totals(model, found, batches, "gradient", lambda site, total: got.setdefault(site.name, total))
        return got

    once, few = collect(), len(passes)
    monkeypatch.setattr(streaming, "ROOM", 0)
    often = collect()
    assert len(passes) - few > few
    assert all(torch.equal(once[name], often[name]) for name in once)


@pytest.mark.parametrize(
    ("method", "batches", "words"),
    [
        ("corda", None, "starts from the covariance of inputs here, which needs data: give calibration="),
        (
            "lora-sb",
            None,
            "starts from the gradient of the loss here, which needs data: give calibration=.*with labels",
        ),
        ("lora-sb", [], "calibration is empty; give at least one batch with labels"),
        ("lora-sb", [{"ids": torch.zeros(1, 2, dtype=torch.long)}], "does it hold labels"),
        ("corda", [{"words": 1}], "Classifier refuses calibration batch 0, which holds .*'words'.*TypeError"),
    ],
)
def test_flaws_of_calibration_are_told_and_change_nothing(classifier, method, batches, words):
    model, _ = classifier
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    with pytest.raises(RecipeError, match=words):
        fg.graft(model, method, rank=2, calibration=batches)
    assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == before
    assert type(model.layers[0].mlp.up_proj) is nn.Linear


def test_layers_that_no_batch_reaches_say_so(classifier):
    model, batches = classifier
    model.unused = nn.Linear(8, 8)
    with pytest.raises(SiteError, match="calibration tells nothing of 'unused'"):
        fg.graft(model, "corda", rank=2, calibration=batches)


@pytest.mark.parametrize("method", ["pissa", "minor-start", "lora-xs"])
def test_factors_come_from_the_base_whatever_is_written_in_it(classifier, method):
    model, _ = classifier
    what = {
        "parts": [{"where": {"role": "up"}, "what": {"kind": "low-rank", "init": "minor", "rank": 2}}],
        "heads": "none",
    }
    recipe = what if method == "minor-start" else {"name": method, "rank": 2}

    def tensors(graft: Graft):
        return {
            f"{slot.key}/{name}": t.clone()
            for slot in graft.all_slots
            if slot.delta.kind != "replacement"
            for name, t in slot.tensors()
        }

    fresh = fg.graft(model, recipe)
    expected = tensors(fresh)
    fresh.detach()
    for beneath, merge in (({"name": "lora", "rank": 2}, True), ("full", False)):
        other = fg.graft(model, beneath)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.3 * torch.randn_like(p))
        if merge:
            other.merge()
        model(torch.zeros(1, 2, dtype=torch.long))
        above = fg.graft(model, recipe)
        found = tensors(above)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        above.detach()
        other.detach()
