"""Wide factors are multiplied whichever way takes less, what is made of trained numbers is not kept, nor filed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finegraft as fg
from finegraft.deltas.delta import Delta
from finegraft.registry import kinds
from finegraft.testing.memory import held_bytes

OUT, IN = 24, 32
FEW, MANY = 3, 200
WIDE: list[dict[str, Any]] = [
    {"kind": "random-basis", "rank": 16},
    {"kind": "random-basis", "rank": 16, "frozen": False},
    {"kind": "random-sum", "rank": 8, "alpha": 8.0},
    {"kind": "spectral"},
    {"kind": "spectral", "support": "top", "band": 1},
    {"kind": "triplets", "rank": 8, "train": "values"},
]


def trained(what: dict[str, Any], *, width: int = IN, out: int = OUT) -> tuple[nn.Module, fg.Graft]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out))
    graft = fg.graft(model, {"parts": [{"where": {"type": "linear"}, "what": what}], "heads": "none"})
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, graft


def results(model: nn.Module, graft: fg.Graft, tokens: int) -> list[Tensor]:
    x = torch.randn(tokens, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = model(x)
    model.zero_grad()
    (torch.linspace(-1, 1, y.numel()).view(y.shape) * y).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in graft.parameters())]


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("what", WIDE, ids=str)
def test_either_way_gives_the_outputs_and_gradients_of_the_dense_weight(what, tokens, monkeypatch):
    model, graft = trained(what)
    found = results(model, graft, tokens)
    monkeypatch.setattr(kinds[what["kind"]], "forward", Delta.forward)
    for ours, plain in zip(found, results(model, graft, tokens), strict=True):
        assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("what", [WIDE[0], WIDE[2], WIDE[3]], ids=str)
def test_a_dense_sum_is_taken_for_many_tokens_alone(what, monkeypatch):
    model, graft = trained(what)
    (slot,) = graft.all_slots
    ways = []
    taken = slot.delta.dense_takes_less
    monkeypatch.setattr(type(slot.delta), "dense_takes_less", lambda _, *given: ways.append(taken(*given)) or ways[-1])
    for tokens in (FEW, MANY):
        model(torch.randn(tokens, IN))
    assert (ways[0], ways[-1]) == (False, True)


def test_scaled_random_factors_are_not_kept_for_backward():
    model, _ = trained({"kind": "random-sum", "rank": 8, "alpha": 8.0}, width=64, out=64)
    x = torch.randn(FEW, 64)
    output = x.nbytes
    assert held_bytes(model, lambda: model(x)).total <= 2 * output  # the output; the input was there before


def test_trained_vectors_around_fixed_factors_keep_two_products():
    model, _ = trained({"kind": "random-basis", "rank": 16})
    x = torch.randn(FEW, IN)
    assert held_bytes(model, lambda: model(x)).total <= 4 * FEW * (16 + 2 * OUT)


@pytest.mark.parametrize("method", ["vera", "randlora", "fourierft"])
def test_random_matrices_are_in_no_file(method, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))
    graft = fg.graft(model, method, heads="none")
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    graft.save(tmp_path)
    size = sum((tmp_path / name).stat().st_size for name in ("graft.safetensors", "graft.json"))
    assert size <= 1.1 * sum(p.nbytes for p in graft.parameters())
