"""What single kinds compute, by hand; everything they share is checked by the laws."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finegraft.deltas.bottleneck import Bottleneck
from finegraft.deltas.low_rank import LowRank
from finegraft.errors import SiteError
from finegraft.grafting.graft import Graft
from finegraft.grafting.make import graft
from finegraft.locate.find import sites
from tests.models import zoo


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))


def put(model, what, where=None, **part) -> Graft:
    return graft(model, {"parts": [{"where": where or {"name": "0"}, "what": what, **part}], "heads": "none"})


def slot(made: Graft):
    (found,) = made.all_slots
    return found


@torch.no_grad()
def fill(made: Graft, value: float) -> None:
    for parameter in made.parameters():
        parameter.fill_(value)


class TestLowRank:
    @pytest.mark.parametrize(
        ("scaling", "expected"), [("alpha/r", 12 / 4), ("alpha/sqrt(r)", 12 / math.sqrt(4))], ids=["lora", "rslora"]
    )
    def test_scale(self, scaling, expected):
        assert LowRank(rank=4, alpha=12, scaling=scaling).scale == expected

    def test_what_trains(self, model):
        made = put(model, {"kind": "low-rank", "rank": 2, "train_a": False})
        assert [name for name, _ in made.named_parameters()] == ["0/0.0/b"]
        assert made.num_trainable == 8 * 2

    def test_offset_is_in_the_rank_wide_product(self, model):
        x = torch.randn(3, 6)
        base = model[0](x)
        made = put(model, {"kind": "low-rank", "rank": 2, "alpha": 4.0, "offset": True})
        p = slot(made)
        with torch.no_grad():
            p.b.normal_()
            p.c.normal_()
        expected = base + 2.0 * (x @ p.a.T + p.c) @ p.b.T
        torch.testing.assert_close(model[0](x), expected)

    def test_dropout_acts_on_the_input_of_a_in_training_only(self, model):
        made = put(model, {"kind": "low-rank", "rank": 2, "dropout": 0.5})
        fill(made, 0.1)
        x = torch.randn(64, 6)
        model.eval()
        assert torch.equal(model[0](x), model[0](x))
        model.train()
        torch.manual_seed(0)
        first = model[0](x)
        torch.manual_seed(0)
        assert torch.equal(model[0](x), first)
        assert not torch.equal(model[0](x), first)

    def test_a_rank_larger_than_the_layer(self, model):
        with pytest.raises(
            SiteError, match=r"rank 7 is larger than '0', whose matrix is 8 x 6: use a rank of at most 6"
        ):
            put(model, {"kind": "low-rank", "rank": 7})

    def test_offset_needs_a_linear_site(self):
        with pytest.raises(SiteError, match="an offset is defined on linear sites; '0' is a embedding site"):
            put(nn.Sequential(nn.Embedding(5, 8)), {"kind": "low-rank", "rank": 1, "offset": True})


class TestMagnitude:
    def test_a_row_of_zeros_stays_zero(self, model):
        with torch.no_grad():
            model[0].weight[2] = 0
        made = put(model, {"kind": "magnitude"})
        y = model[0](torch.randn(3, 6))
        assert torch.isfinite(y).all()
        y.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in made.parameters())

    def test_direction_and_length_apart(self, model):
        x = torch.randn(3, 6)
        made = put(model, [{"kind": "low-rank", "rank": 2}, {"kind": "magnitude"}])
        fill(made, 0.5)
        low_rank, magnitude = made.all_slots
        directions = model[0].weight + low_rank.delta.scale * low_rank.b @ low_rank.a
        rows = magnitude.magnitude[:, None] * directions / directions.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model[0](x), F.linear(x, rows, model[0].bias))


class TestScaleShift:
    def test_on_the_output_and_on_the_input(self, model):
        x, base = torch.randn(3, 6), model[0]
        y = base(x)
        made = put(model, {"kind": "scale-shift", "shift": True})
        fill(made, 0.5)
        torch.testing.assert_close(base(x), 1.5 * y + 0.5)
        made.detach()
        fill(put(model, {"kind": "scale-shift", "side": "in"}), 0.5)
        torch.testing.assert_close(base(x), F.linear(1.5 * x, base.weight, base.bias))

    @pytest.mark.parametrize(
        ("where", "what", "words"),
        [
            ({"name": "1"}, {"side": "in"}, "scaling the input is not defined on '1', a norm site; use side: out"),
            ({"name": "2"}, {"side": "in"}, "scaling the input is not defined on '2', a conv site"),
        ],
    )
    def test_where_it_is_not_defined(self, model, where, what, words):
        model.append(nn.Conv1d(4, 4, 1, groups=2))
        with pytest.raises(SiteError, match=words):
            put(model, {"kind": "scale-shift", **what}, where)

    def test_a_bare_tensor_has_no_shift(self):
        model, _ = zoo.build("mixtral")
        with pytest.raises(SiteError, match="a shift needs a layer; '.*' is a bare tensor"):
            put(model, {"kind": "scale-shift", "shift": True}, {"type": "tensor"})


class TestBias:
    def test_a_layer_without_one_gets_one(self):
        model = nn.Sequential(nn.Linear(4, 3, bias=False))
        x = torch.randn(2, 4)
        y = model(x)
        made = put(model, {"kind": "bias"})
        fill(made, 0.5)
        torch.testing.assert_close(model(x), y + 0.5)
        made.merge()
        assert torch.equal(model[0].bias, torch.full((3,), 0.5))
        made.detach()
        assert model[0].bias is None
        assert torch.equal(model(x), y)

    def test_full_needs_one_to_be_there(self):
        with pytest.raises(SiteError, match="'0' has no bias; kind 'bias' adds one"):
            put(nn.Sequential(nn.Linear(4, 3, bias=False)), {"kind": "full", "tensors": "bias"})


class TestMask:
    @pytest.mark.parametrize(("unit", "shape"), [("entry", (8, 6)), ("row", (8, 1)), ("column", (1, 6))])
    def test_units(self, model, unit, shape):
        made = put(model, {"kind": "mask", "unit": unit})
        assert slot(made).scores.shape == shape
        with torch.no_grad():
            slot(made).scores[0, 0] = -1
        kept = torch.ones(8, 6)
        kept[{"entry": (0, 0), "row": (0,), "column": (slice(None), 0)}[unit]] = 0
        x = torch.randn(3, 6)
        torch.testing.assert_close(model[0](x), F.linear(x, model[0].weight * kept, model[0].bias))

    def test_gradient_passes_the_threshold_unchanged(self, model):
        made = put(model, {"kind": "mask"})
        with torch.no_grad():
            slot(made).scores[:4] = -1
        x = torch.randn(3, 6)
        model[0](x).sum().backward()
        torch.testing.assert_close(slot(made).scores.grad, model[0].weight * x.sum(0))


class TestBottleneck:
    def test_counts_what_the_paper_counts(self, model):
        made = put(model, {"kind": "bottleneck", "width": 3})
        assert made.num_trainable == 2 * 8 * 3 + 3 + 8

    @pytest.mark.parametrize("placement", ["serial", "parallel"])
    def test_reads_the_output_or_the_input(self, model, placement):
        x = torch.randn(3, 6)
        y = model[0](x)
        made = put(
            model, {"kind": "bottleneck", "width": 3, "placement": placement, "activation": "tanh", "scale": 2.0}
        )
        p = slot(made)
        with torch.no_grad():
            p.up.normal_()
            p.up_bias.normal_()
        z = y if placement == "serial" else x
        hidden = torch.tanh(F.linear(z, p.down, p.down_bias))
        torch.testing.assert_close(model[0](x), y + 2 * F.linear(hidden, p.up, p.up_bias))

    def test_sublayers_see_their_own_input(self):
        """A parallel adapter on a feed-forward sublayer reads what goes into the sublayer."""
        model, batch = zoo.build("llama")
        where = {"role": "ffn", "layer": 0}
        made = put(model, {"kind": "bottleneck", "width": 3, "placement": "parallel", "activation": "tanh"}, where)
        p, seen = slot(made), {}
        with torch.no_grad():
            p.up.normal_()
        mlp = model.model.layers[0].mlp
        hook = mlp.register_forward_hook(lambda module, args, y: seen.update(x=args[0], y=y))
        model(**batch)
        hook.remove()
        with made.disabled():
            below = mlp(seen["x"])
        torch.testing.assert_close(seen["y"], below + F.linear(torch.tanh(F.linear(seen["x"], p.down)), p.up))

    @pytest.mark.parametrize(("init", "largest"), [("houlsby", 0.02), ("bert", 0.2)])
    def test_starts_near_the_identity(self, model, init, largest):
        p = slot(put(model, {"kind": "bottleneck", "width": 4, "init": init}))
        for factor in (p.down, p.up):
            assert 0 < factor.abs().max() <= largest
        assert not p.down_bias.any()
        assert not Bottleneck(init=init).starts_as_identity

    def test_a_parallel_one_needs_a_vector_input(self, model):
        with pytest.raises(
            SiteError, match="a parallel bottleneck needs a vector input; '1' is a norm site: use serial"
        ):
            put(model, {"kind": "bottleneck", "placement": "parallel"}, {"name": "1"})


class TestFull:
    @pytest.mark.parametrize(("tensors", "count"), [("both", 8 * 6 + 8), ("weight", 8 * 6), ("bias", 8)])
    def test_tensors(self, model, tensors, count):
        assert put(model, {"kind": "full", "tensors": tensors}).num_trainable == count

    def test_half_precision_bases_train_in_single(self):
        model = nn.Sequential(nn.Linear(4, 3)).bfloat16()
        made = put(model, {"kind": "full"})
        assert {p.dtype for p in made.parameters()} == {torch.float32}
        steps = 300
        for _ in range(steps):
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(1e-4)
        before = {n: p.clone() for n, p in model.named_parameters() if "finegraft" not in n}
        model(torch.ones(1, 4, dtype=torch.bfloat16))
        after = dict(model.named_parameters())
        changes = [(after[n] - p).float().mean().item() for n, p in before.items()]
        assert all(abs(change - steps * 1e-4) < 2e-3 for change in changes), "small steps add up"


def test_a_kind_on_a_site_it_does_not_go_on(model):
    with pytest.raises(SiteError, match="kind 'low-rank' cannot be put on '1', a norm site; it goes on linear, conv"):
        put(model, {"kind": "low-rank", "rank": 1}, {"name": "1"})


def test_sites_are_untouched_by_failures(model):
    before = [type(m) for m in model.modules()]
    with pytest.raises(SiteError):
        put(model, {"kind": "low-rank", "rank": 1}, {"name": ["0", "1"]})
    assert [type(m) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    assert len(sites(model)) == 2
