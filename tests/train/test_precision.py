"""Choosing a precision: by measurement, and without leaving a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from finegraft.errors import RecipeError
from finegraft.train import precision
from finegraft.train.precision import choose_precision
from tests.train.tiny import BagOfTokens, collate, tiny_rows

CPU = torch.device("cpu")
BATCH = collate(list(tiny_rows(8)))


def timed(monkeypatch: pytest.MonkeyPatch, *, bf16: float, loss: float = 1.0) -> None:
    """Pretends that passes take 1 s in fp32 and ``bf16`` seconds under autocast."""

    def one_pass(model: Any, batch: Any, name: str, device: Any) -> tuple[float, float]:
        return (bf16, loss) if name == "bf16" else (1.0, 1.0)

    monkeypatch.setattr(precision, "_timed_pass", one_pass)
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)


@pytest.mark.parametrize(("bf16", "expected"), [(0.5, "bf16"), (0.9, "bf16"), (0.91, "fp32"), (2.0, "fp32")])
def test_bf16_has_to_be_clearly_faster(monkeypatch: pytest.MonkeyPatch, bf16: float, expected: str) -> None:
    timed(monkeypatch, bf16=bf16)
    found = choose_precision(BagOfTokens(), BATCH, device=CPU)
    assert (found.name, found.seconds) == (expected, {"fp32": 1.0, "bf16": bf16})
    assert f"{bf16:.2f}" in found.reason


def test_bf16_has_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, bf16=0.1, loss=1.2)
    found = choose_precision(BagOfTokens(), BATCH, device=CPU)
    assert found.name == "fp32"
    assert "1.2" in found.reason


def test_a_processor_without_bf16_and_a_half_precision_base_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, bf16=0.1)
    assert choose_precision(BagOfTokens().bfloat16(), BATCH, device=CPU).seconds is None
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    found = choose_precision(BagOfTokens(), BATCH, device=CPU)
    assert (found.name, found.seconds) == ("fp32", None)


def test_measuring_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithStatistics(BagOfTokens):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, **batch: Any) -> dict[str, Any]:
            self.norm(torch.rand(4, 8))
            return super().forward(**batch)

    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    model = WithStatistics().eval()
    model.hidden.weight.grad = torch.ones(8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = choose_precision(model, BATCH, device=CPU)
    assert set(found.seconds or ()) == {"fp32", "bf16"}
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model.hidden.weight.grad, torch.ones(8, 8))
    assert model.embed.weight.grad is None
    assert not any(module.training for module in model.modules())


def test_autocast_computes_in_bf16_only_when_asked() -> None:
    layer, x = nn.Linear(4, 4), torch.rand(2, 4)
    with precision.autocast("bf16", CPU):
        assert layer(x).dtype == torch.bfloat16
    with precision.autocast("fp32", CPU):
        assert layer(x).dtype == torch.float32
    with pytest.raises(RecipeError, match="unknown precision 'fp8'"):
        precision.autocast("fp8", CPU)
