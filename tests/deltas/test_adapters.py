"""What adapters compute, by hand, and how many numbers they train."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finegraft.deltas.projections import Binary, Kronecker
from finegraft.deltas.token_mixing import routed
from finegraft.errors import NotMergeable, SiteError
from finegraft.grafting.load import load
from finegraft.grafting.make import graft, resolve
from finegraft.testing.base_models import Classifier
from finegraft.testing.bases import leading
from tests.deltas.adapters import bottleneck, output, put, stir, transformer
from tests.models import zoo

D = 32


@pytest.fixture
def bert():
    return zoo.build("bert")


@pytest.fixture
def small():
    return transformer()


COUNTS = {  # at a site of width d, with bottleneck r
    "dense": (bottleneck(width=8), lambda d, r: 2 * d * r + r + d, 0),
    "phm": (bottleneck(width=8, projection="kronecker"), lambda d, r: 2 * (d + r) + r + d, 4**3),
    "phm of rank 2": (
        bottleneck(width=8, projection="kronecker", projection_rank=2),
        lambda d, r: 4 * (d + r) + r + d,
        4**3,
    ),
    "routed": (bottleneck(width=8, routing="product"), lambda d, r: 2 * d * r + r + d, 0),
    "four experts in one": (
        bottleneck(width=8, experts=4, join="union"),
        lambda d, r: 2 * d * r + r + d,
        0,
    ),
    "random features": (bottleneck(width=8, down="frozen"), lambda d, r: d * r + r + d, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_the_paper(bert, name):
    what, at_site, shared = COUNTS[name]
    made = put(bert[0], what, where=["attn", "ffn"])
    assert made.num_trainable == 4 * at_site(D, 8) + shared


def test_a_shared_map_down_is_one_tensor(bert):
    made = put(bert[0], bottleneck(width=8, down="shared"))
    first, second = made.all_slots
    assert first.down is second.down
    assert first.up is not second.up
    assert made.num_trainable == D * 8 + 2 * (8 + 8 * D + D)


def test_a_map_that_sites_of_other_widths_cannot_share_is_refused():
    model = Classifier(8, 24, 4, depth=1, classes=2)
    with pytest.raises(SiteError, match="shared by all sites"):
        put(model, bottleneck(width=4, down="shared"), where=["up", "down"])


def test_a_kronecker_map_is_the_sum_of_products():
    kind, generator = Kronecker(terms=2, rank=3), torch.Generator().manual_seed(0)
    p = {name: torch.randn(shape, generator=generator) for name, shape in kind.shapes("up", 6, 4).items()}
    p["rules"] = torch.randn(2, 2, 2, generator=generator)
    blocks = [left @ right for left, right in zip(p["up_left"], p["up_right"], strict=True)]
    expected = sum(torch.kron(rule, block) for rule, block in zip(p["rules"], blocks, strict=True))
    torch.testing.assert_close(kind.matrix(p.__getitem__, "up"), expected)


def test_rules_are_the_same_storage_everywhere(bert):
    made = graft(bert[0], "compacter", heads="none")
    slots = [slot for slot in made.all_slots if slot.delta.kind == "bottleneck"]
    assert len(slots) == 4
    assert {slot.rules.data_ptr() for slot in slots} == {slots[0].rules.data_ptr()}


def test_a_binary_map_has_two_values_and_one_bit_an_entry(bert, tmp_path):
    model, batch = bert
    made = put(model, bottleneck(width=16, projection="binary", placement="parallel"))
    stir(made)
    slot = made.all_slots[0]
    matrix = Binary().matrix(lambda name: getattr(slot, name), "down")
    assert len(matrix.unique()) == 2
    before = output(model, batch)
    path = made.save(tmp_path / "graft")
    entries = 2 * 2 * 16 * D
    others = 4 * (made.num_trainable - entries)
    assert (path / "graft.safetensors").stat().st_size < entries / 8 + others + 2048
    made.detach()
    load(path, model)
    assert torch.equal(output(model, batch), before)


def test_gradients_pass_a_sign_within_one():
    latent = torch.tensor([[0.5, -2.0]], requires_grad=True)
    size = torch.tensor([3.0])
    Binary().matrix({"up": latent, "up_size": size}.__getitem__, "up").sum().backward()
    assert latent.grad.tolist() == [[3.0, 0.0]]


class TestExperts:
    def test_entries_are_owned_once(self, small):
        made = put(small[0], bottleneck(width=4, experts=4, join="union"))
        owner = made.all_slots[0].owner
        assert sorted(set(owner.flatten().tolist())) == [0, 1, 2, 3]

    def test_a_step_moves_what_one_expert_owns(self, small):
        model, x = small
        made = put(model, bottleneck(width=4, experts=4, join="union", activation="tanh"))
        (slot,) = made.all_slots
        slot.train()
        model(x).square().sum().backward()
        touched = slot.up.grad != 0
        assert len(slot.owner[touched].unique()) == 1
        assert touched.sum() == (slot.owner == slot.owner[touched][0]).sum()

    def test_the_union_is_the_adapter(self, small):
        model, x = small
        made = put(model, bottleneck(width=4, experts=3, join="union"))
        stir(made)
        state, found = made.state(), model(x)
        made.detach()
        put(model, bottleneck(width=4)).load_state(state)
        assert torch.equal(model(x), found)

    def test_equal_experts_average_to_one_of_them(self, small):
        model, x = small
        made = put(model, bottleneck(width=4, experts=3, init="bert", activation="tanh"))
        (slot,) = made.all_slots
        with torch.no_grad():
            slot.up.copy_(slot.up[:1].expand_as(slot.up))
        expected = model(x)
        slot.train()
        torch.testing.assert_close(model(x), expected)


class TestRouting:
    z = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))

    def test_ones_leave_a_product_alone(self):
        z = torch.cat([torch.ones(2, 2, 3), self.z], dim=1)
        assert torch.equal(routed("product", z, 2), z)

    def test_attention_takes_a_true_transpose(self):
        other = self.z[:, :2]
        expected = torch.einsum("bnr,bmr,bms->bns", self.z, other, other)
        torch.testing.assert_close(routed("attention", self.z, 2), expected)

    def test_map_repeats_the_mean_in_every_row(self):
        mean = self.z[:, :2].mean(dim=1)
        rows = mean.unsqueeze(1).expand(-1, 3, -1)
        torch.testing.assert_close(routed("map", self.z, 2), self.z @ rows)


class TestConvolutions:
    def test_a_kernel_of_one_keeps_tokens_apart(self, small):
        model, x = small
        made = put(
            model, bottleneck(width=4, convolution="conformer", kernel=1, activation="glu", placement="parallel")
        )
        stir(made)
        (slot,) = made.all_slots
        order = torch.randperm(x.shape[1])
        whole = slot.delta._change(slot, x)
        torch.testing.assert_close(slot.delta._change(slot, x[:, order]), whole[:, order])

    def test_front_tokens_pass_by(self, small):
        model, x = small
        plain = bottleneck(width=4, convolution="depthwise", front=2, grid=[2, 2])
        made = put(model, plain)
        stir(made)
        (slot,) = made.all_slots
        hidden = F.relu(F.linear(x, slot.down, slot.down_bias))
        expected = F.linear(hidden, slot.up, slot.up_bias)
        assert torch.allclose(slot.delta._change(slot, x)[:, :2], expected[:, :2], atol=1e-6)
        assert not torch.allclose(slot.delta._change(slot, x)[:, 2:], expected[:, 2:], atol=1e-3)

    def test_a_grid_of_another_size_says_so(self, small):
        model, x = small
        put(model, bottleneck(width=4, convolution="depthwise", grid=[2, 2]))
        with pytest.raises(SiteError, match="2 x 2 has 4 places; there are 6 tokens"):
            model(x)

    def test_volumes_take_kernels_of_three_axes(self, small):
        model, x = small
        made = put(model, bottleneck(width=4, convolution="depthwise", grid=[3, 2, 1]))
        assert made.all_slots[0].conv.shape == (4, 1, 3, 3, 3)
        assert model(x).shape == x.shape

    def test_normalisation_and_convolution_are_used(self, small):
        """Against the reference's convolution whose output, and normalisation whose result, went nowhere."""
        model, x = small
        made = put(model, bottleneck(width=4, convolution="conformer", norm=True, activation="glu"))
        stir(made)
        model(x).square().sum().backward()
        (slot,) = made.all_slots
        assert all(getattr(slot, name).grad.any() for name in ("conv", "norm_gain", "mid_gain"))


@pytest.mark.parametrize("method", ["ast-parallel-ffn", "ast-conformer-attention", "uniadapter", "detris"])
def test_not_both_maps_start_at_zero(bert, method):
    """Against references where only the last bias could train, or some maps up started elsewhere than at zero."""
    model, batch = bert
    before = output(model, batch)
    made = graft(model, method, heads="none")
    assert torch.equal(output(model, batch), before)
    leading(model(**batch)).square().sum().backward()
    assert all(slot.up.grad.any() and slot.down.any() for slot in made.all_slots)


def test_tokens_take_their_own_adapter_only(small):
    model, x = small
    made = put(model, [bottleneck(width=4, front=2, tokens=tokens) for tokens in ("front", "rest")])
    stir(made)
    first, second = made.all_slots
    plain = model.layers[0].mlp(x)
    with made.disabled():
        base = model.layers[0].mlp(x)
    assert not torch.allclose(plain, base)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    assert torch.allclose(model.layers[0].mlp(x)[:, 2:], base[:, 2:])
    assert torch.equal(model.layers[0].mlp(x)[:, :2], plain[:, :2])
    assert first.up.any()


def test_an_adapter_left_out_of_half_of_the_passes_is_the_same_on_average(small):
    model, _ = small
    made = put(model, {"kind": "output-low-rank", "rank": 2, "skip": 0.5}, where="down")
    stir(made)
    layer = model.layers[0].mlp.down_proj
    hidden = torch.randn(4, 16)
    expected = layer(hidden)
    with made.disabled():
        base = layer(hidden)
    made.all_slots[0].train()
    with torch.no_grad():
        seen = {round(float(((layer(hidden) - base) / (expected - base)).mean()), 3) for _ in range(30)}
    assert seen == {0.0, 2.0}
    made.all_slots[0].eval()
    made.merge()
    torch.testing.assert_close(layer(hidden), expected)
    made.scale = 0.0
    torch.testing.assert_close(layer(hidden), base)


@pytest.mark.parametrize(("gate", "shape"), [("element", (3, 6, 8)), ("token", (3, 6, 1)), ("sample", (3, 1, 1))])
def test_gates_are_as_fine_as_they_say(small, gate, shape):
    model, x = small
    made = put(model, {"kind": "feature-gate", "gate": gate, "width": 4})
    (slot,) = made.all_slots
    assert slot.delta._logits(slot, x, x).shape == shape
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    found = model.layers[0].mlp(x)
    with made.disabled():
        torch.testing.assert_close(found, model.layers[0].mlp(x) / 2)


def test_no_adapters_where_they_are_dropped():
    model, _ = zoo.build("bert")
    made = graft(model, "adapter-drop", heads="none")
    assert {placement.site.layer for placement in made.placements} == {1}
    assert resolve("houlsby").parts[0].what[0].width == 16


@pytest.mark.parametrize("method", ["houlsby", "compacter", "mixphm", "coda", "dyt", "adapter-fusion", "vl-pet"])
def test_what_cannot_merge_says_so(method):
    model, _ = zoo.build("bert")
    with pytest.raises(NotMergeable, match="cannot merge"):
        graft(model, method, heads="none").merge()
