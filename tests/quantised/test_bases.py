"""Grafts on bases whose weights are quantised."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import finegraft as fg
from finegraft.errors import BaseMismatch, NotMergeable, RecipeError, SiteError, StoreError
from finegraft.grafting.rounding import roundings
from finegraft.locate.find import sites
from finegraft.quantised.quantiser import Quantiser
from finegraft.quantised.stored import is_quantised
from finegraft.quantised.tensor import QuantisedTensor
from finegraft.registry import quantisers

BATCH = torch.randn(5, 32, generator=torch.Generator().manual_seed(9))


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)).to(dtype).eval()


def quantised(to="nf4", dtype=torch.float32, **settings):
    return fg.quantise(network(dtype), to, **settings)


def trained(model, method="modulora", **settings):
    graft = fg.graft(model, method, **({"rank": 4} | settings))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in graft.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return graft


def gradients(model, graft):
    x = BATCH.clone().requires_grad_()
    y = model(x.to(next(iter(model.parameters())).dtype))
    return y, torch.autograd.grad(y.square().sum(), [x, *graft.parameters()])


@pytest.mark.parametrize("to", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("method", ["modulora", "hra", "dora", "boft", "bitfit", "pissa"])
def test_outputs_and_gradients_are_those_on_the_dense_numbers(to, method):
    settings = {} if method in ("hra", "bitfit", "boft") else {"rank": 4}
    small = quantised(to)
    dense = fg.dequantise(copy.deepcopy(small))
    y, grads = gradients(small, trained(small, method, **settings) if settings else _plain(small, method))
    expected, others = gradients(dense, trained(dense, method, **settings) if settings else _plain(dense, method))
    torch.testing.assert_close(y, expected)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-4, rtol=1e-4)


def _plain(model, method):
    graft = fg.graft(model, method)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in graft.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return graft


def test_backward_keeps_no_dense_weight():
    model = quantised()
    graft = trained(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(BATCH)
    assert graft.num_trainable
    assert not [t for t in kept if tuple(t.shape) in ((48, 32), (32, 48)) and not is_quantised(t)]


def test_weights_take_few_bytes_and_survive_copies_and_casts():
    model = quantised()
    weight = model[0].weight
    assert isinstance(weight, nn.Parameter) and not weight.requires_grad
    assert sum(t.numel() * t.element_size() for t in weight.codes.values()) < 48 * 32 * 0.6
    twin = copy.deepcopy(model)
    assert torch.equal(twin(BATCH), model(BATCH)) and twin[0].weight.codes["codes"] is not weight.codes["codes"]
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert isinstance(half[0].weight, QuantisedTensor) and half(BATCH.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(BATCH), half(BATCH.bfloat16()), atol=0.05, rtol=0.05)


def test_merging_rounds_within_the_bound_and_says_so_and_unmerging_restores_every_bit():
    model = quantised()
    before = {name: t.clone() for name, t in model[0].weight.codes.items()}
    graft = trained(model)
    with pytest.warns(RuntimeWarning, match="merged into 2 quantised weights, which are rounded again"):
        graft.merge()
    found = roundings(graft.placements)
    assert len(found) == 2 and all(r.share > 0 and r.largest <= r.bound + 1e-6 for r in found)
    assert isinstance(model[0].weight, QuantisedTensor)
    graft.unmerge()
    assert all(torch.equal(model[0].weight.codes[name], t) for name, t in before.items())


def test_saved_grafts_load_on_the_same_quantised_base_alone(tmp_path):
    model = quantised()
    trained(model).save(tmp_path / "graft")
    again = quantised()
    fg.load(tmp_path / "graft", again)
    torch.testing.assert_close(again(BATCH), model(BATCH))
    for other in (network(), quantised("int4")):
        with pytest.raises(BaseMismatch, match="same architecture with other values"):
            fg.load(tmp_path / "graft", other)


def test_what_trains_in_place_says_that_it_cannot():
    model = quantised()
    with pytest.raises(SiteError, match="kind 'full' trains numbers of the base in place"):
        fg.graft(model, "full")
    assert fg.graft(model, "bitfit").num_trainable == 80


def test_gradients_of_quantised_weights_are_refused():
    with pytest.raises(SiteError, match="no gradient"):
        fg.graft(quantised(), "lora-sb", rank=2, calibration=[{"input": BATCH}])


class TestStartsOfTheRemainder:
    @pytest.mark.parametrize(("method", "start"), [("lq-lora", "factors"), ("loftq", "codes")])
    def test_it_is_nearer_to_the_dense_base_than_rounding_alone(self, method, start):
        base, plain = network(), quantised({"kind": "nf4", "width": 3})
        model = quantised({"kind": "nf4", "width": 3}, rank=6, start=start)
        graft = fg.graft(model, method, rank=6)
        for slot, layer, dense, rounded in zip(graft.all_slots, model[::2], base[::2], plain[::2], strict=True):
            start_of = slot.delta.weight(slot, layer.weight.dequantize())
            assert (start_of - dense.weight).norm() < 0.95 * (rounded.weight.dequantize() - dense.weight).norm()

    def test_a_dense_base_leaves_nothing_to_make_up_for(self):
        model = network()
        expected = model(BATCH)
        fg.graft(model, "lq-lora", rank=2)
        assert torch.equal(model(BATCH), expected)

    @pytest.mark.parametrize(("rank", "words"), [(None, "it left out none"), (3, "ones of rank 3")])
    def test_a_base_without_such_factors_says_so(self, rank, words):
        with pytest.raises(SiteError, match=words):
            fg.graft(quantised(rank=rank), "loftq", rank=2)


class TestOwnFormats:
    def test_two_functions_are_enough(self):
        @quantisers.register("signs")
        class Signs(Quantiser):
            kind = "signs"

            def quantise(self, w):
                return {"signs": w > 0, "size": w.abs().mean().view(1)}

            def dequantise(self, codes, shape):
                return (2.0 * codes["signs"] - 1) * codes["size"]

        try:
            model = quantised("signs")
            w = network()[0].weight
            torch.testing.assert_close(model[0].weight.dequantize(), w.sign() * w.abs().mean())
            trained(model)
            model(BATCH).sum().backward()
        finally:
            quantisers.remove("signs")

    @pytest.mark.parametrize(
        ("there", "back", "words"),
        [
            (lambda w: w, lambda codes: codes, "quantise gives a dict of tensors"),
            (lambda w: {"w": w}, lambda codes: codes["w"].flatten(), "dequantise gives back a matrix"),
            (lambda w: {"w": w * float("nan")}, lambda codes: codes["w"], "of finite numbers"),
        ],
    )
    def test_functions_that_do_not_fit_are_told(self, there, back, words):
        model = network()
        with pytest.raises(SiteError, match=words):
            fg.quantise(model, Given(there, back))
        assert not is_quantised(model[0].weight)

    def test_one_that_fails_on_the_way_leaves_the_base_as_it_is(self):
        calls = iter(range(9))

        def there(w):
            if next(calls) == 3:
                raise ArithmeticError
            return {"w": w}

        model = network()
        with pytest.raises(ArithmeticError):
            fg.quantise(model, Given(there, lambda codes: codes["w"]))
        assert not is_quantised(model[0].weight)

    def test_what_is_registered_is_a_class(self):
        quantisers.register("a function")(len)
        try:
            with pytest.raises(RecipeError, match="no subclass of"):
                quantised("a function")
        finally:
            quantisers.remove("a function")


class Given(Quantiser):
    """A format by two functions."""

    kind = "given"
    there: Any
    back: Any

    def __init__(self, there, back):
        super().__init__(there=there, back=back)

    def quantise(self, w):
        return self.there(w)

    def dequantise(self, codes, shape):
        return self.back(codes)


class TestBudget:
    def test_bits_stay_in_the_budget_and_gradients_weigh(self):
        pytest.importorskip("scipy")
        model = quantised(bits=3.0)
        sizes = [layer.weight.quantiser.bits(layer.weight.codes, layer.weight.shape) for layer in model[::2]]
        assert sum(sizes) / 2 <= 3.0

    def test_calibration_weighs_errors(self):
        class WithLoss(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = network()

            def forward(self, x):
                return {"loss": self.body(x).square().mean()}

        narrow = {"x": BATCH * (torch.arange(32) < 4)}
        weighed, plain = (fg.quantise(WithLoss(), rank=4, calibration=given) for given in ([narrow], None))
        used = [(m.body[0].weight.dequantize() - network()[0].weight) for m in (weighed, plain)]
        for model, error in zip((weighed, plain), used, strict=True):
            a, b = model.body[0].weight.left_out
            error += b @ a
        assert used[0][:, :4].norm() < used[1][:, :4].norm()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: quantised("nf5"), RecipeError, "unknown quantiser 'nf5'; did you mean 'nf4'"),
        (lambda: quantised({"kind": "nf4", "width": 9}), RecipeError, "quantiser 'nf4' is not valid:\n  width"),
        (lambda: quantised(["nf4", "int8"]), RecipeError, "several formats need a budget"),
        (lambda: quantised([]), RecipeError, "no format is given"),
        (lambda: quantised(4), RecipeError, "a format is a name"),
        (lambda: quantised(rank="4"), RecipeError, "rank is a whole number of at least 1, not '4'"),
        (lambda: quantised(steps=0, rank=2), RecipeError, "steps is a whole number"),
        (lambda: quantised(bits=float("nan")), RecipeError, "bits is a number above 0"),
        (lambda: quantised(where="q"), RecipeError, "where is a query"),
        (lambda: quantised(where={"rol": "q"}), RecipeError, "unknown key 'rol'"),
        (lambda: quantised(calibration=3), RecipeError, "calibration is an iterable"),
        (lambda: fg.quantise(network().to("meta")), SiteError, "on the meta device"),
        (lambda: fg.quantise(quantised()), SiteError, "quantised already"),
        (lambda: fg.quantise(trained(network()).model), RecipeError, "carries grafts"),
        (lambda: fg.dequantise(trained(quantised()).model), RecipeError, "carries grafts"),
    ],
)
def test_flaws_are_told(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_weight_that_no_format_holds_leaves_the_base_as_it_is():
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(SiteError, match="'2' has a weight that is not a finite number"):
        fg.quantise(model)
    assert not is_quantised(model[0].weight)


def test_saving_a_quantised_base_says_what_to_do(tmp_path):
    with pytest.raises(StoreError, match="make the base dense first"):
        save_model(quantised(), str(tmp_path / "base.safetensors"))


def test_a_merge_that_loses_nothing_does_not_warn():
    graft = fg.graft(quantised(), "modulora", rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graft.merge()


class TestTorchao:
    @pytest.fixture
    def model(self):
        quantization = pytest.importorskip("torchao.quantization")
        model = network(torch.bfloat16)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    def test_grafts_train_save_and_load(self, model, tmp_path):
        graft = trained(model)
        _, (grad, *others) = gradients(model, graft)
        assert bool(grad.any()) and all(bool(g.isfinite().all()) for g in others)
        graft.save(tmp_path / "graft")
        expected = model(BATCH.bfloat16())
        graft.detach()
        fg.load(tmp_path / "graft", model)
        assert torch.equal(model(BATCH.bfloat16()), expected)

    def test_what_reads_weights_sees_them_dense(self, model):
        site = sites(model)["0"]
        assert site.weight.shape == (48, 32) and type(site.weight) is torch.Tensor
        trained(model, "dora")
        assert bool(model(BATCH.bfloat16()).isfinite().all())

    def test_merging_says_what_would_be_right(self, model):
        graft = trained(model)
        with pytest.raises(NotMergeable, match="make the base dense first"):
            graft.merge()
        graft.detach()
        merged = trained(fg.dequantise(model))
        merged.merge()
        assert not is_quantised(model[0].weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_grafts_train_save_and_load_on_bases_of_bitsandbytes(bits, tmp_path):
    library = pytest.importorskip("bitsandbytes")
    dense = nn.Linear(64, 128)
    if bits == 4:
        layer = library.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = library.nn.Linear8bitLt(64, 128, has_fp16_weights=False)
    layer.load_state_dict(dense.state_dict())
    model = nn.Sequential(layer).to("cpu")
    x = torch.randn(4, 64)
    model(x)
    (site,) = sites(model).where(type="linear")
    assert site.shape == (128, 64)
    torch.testing.assert_close(site.weight, dense.weight.detach(), atol=0.03, rtol=0)
    graft = trained(model)
    model(x.requires_grad_()).square().sum().backward()
    assert x.grad is not None and all(bool(p.grad.any()) for p in graft.parameters())
    graft.save(tmp_path / "graft")
    expected = model(x)
    graft.detach()
    fg.load(tmp_path / "graft", model)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(NotMergeable, match="make the base dense first"):
        next(iter(fg.grafts(model))).merge()
