"""The counters of bytes kept for backward, on networks small enough to count by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from finegraft.errors import SiteError
from finegraft.testing.memory import floor_bytes, held_bytes, saved_bytes

TOKENS, WIDTH, INNER, FLOAT = 5, 7, 11, 4
LOSS = FLOAT


class TwoLayers(nn.Module):
    """``w2 relu(w1 x)``: relu keeps its output, each linear layer its input if its weight trains."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)))


@pytest.fixture
def model() -> TwoLayers:
    return TwoLayers()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH)


def test_counts_the_input_and_the_shared_activation_once(model, x):
    saved = saved_bytes(model, lambda: model(x).sum())
    assert saved.total == FLOAT * TOKENS * (WIDTH + INNER)  # relu's output is also the input of down: one storage
    assert saved.storages == 2


def test_counts_nothing_where_nothing_trains(model, x):
    model.requires_grad_(False)
    assert int(saved_bytes(model, lambda: model(x).sum())) == 0


def test_backward_from_the_top_layer_keeps_its_input_only(model, x):
    model.up.requires_grad_(False)
    assert saved_bytes(model, lambda: model(x).sum()).total == FLOAT * TOKENS * INNER


def test_weights_and_buffers_are_not_counted_but_casts_of_them_are(model, x):
    model.requires_grad_(False)
    x.requires_grad_()
    relu = FLOAT * TOKENS * INNER
    assert saved_bytes(model, lambda: model(x).sum()).total == relu
    half = FLOAT // 2
    cast = saved_bytes(
        model, lambda: F.linear(F.relu(F.linear(x, model.up.weight)).bfloat16(), model.down.weight.bfloat16())
    )
    assert cast.total == relu + half * INNER * WIDTH


def test_a_saved_slice_counts_as_the_storage_it_pins(x):
    weight = nn.Parameter(torch.randn(WIDTH, 2))
    holder = nn.ParameterList([weight])
    view = saved_bytes(holder, lambda: x[:, :2] @ weight.t())
    copy = saved_bytes(holder, lambda: x[:, :2].clone() @ weight.t())
    assert (view.total, copy.total) == (FLOAT * TOKENS * WIDTH, FLOAT * TOKENS * 2)


def test_what_a_discarded_branch_saved_is_not_counted(model, x):
    def run() -> torch.Tensor:
        model(torch.randn(100, WIDTH)).sum()  # its graph is gone before the next line
        return model(x).sum()

    assert saved_bytes(model, run).total == FLOAT * TOKENS * (WIDTH + INNER)


class _Square(torch.autograd.Function):
    """x**2, keeping ``x`` for backward the right way or behind autograd's back."""

    @staticmethod
    def forward(ctx, x, hidden):
        kept = x.clone()
        ctx.save_for_backward(*([] if hidden else [kept]))
        ctx.kept = kept if hidden else None
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (kept,) = (ctx.kept,) if ctx.kept is not None else ctx.saved_tensors
        return 2 * kept * grad, None


@pytest.mark.parametrize("hidden", [False, True])
def test_custom_functions_cannot_hide_what_they_keep(hidden):
    x = nn.Parameter(torch.randn(TOKENS, WIDTH))
    holder, kept = nn.ParameterList([x]), FLOAT * TOKENS * WIDTH

    def run() -> torch.Tensor:
        return _Square.apply(x, hidden).sum()

    assert saved_bytes(holder, run).total == (0 if hidden else kept)
    assert held_bytes(holder, run).total == kept + LOSS


def test_held_is_saved_plus_the_result_less_inputs_that_were_there(model, x):
    run_bytes = saved_bytes(model, lambda: model(x).sum()).total
    assert held_bytes(model, lambda: model(x).sum()).total == run_bytes - FLOAT * TOKENS * WIDTH + LOSS


def test_held_sees_what_checkpoints_keep(model, x):
    def run() -> torch.Tensor:
        return checkpoint(model, x * 1.0, use_reentrant=False).sum()

    assert held_bytes(model, run).total == FLOAT * TOKENS * WIDTH + LOSS


def test_held_sees_caches_of_the_model(model, x):
    model.requires_grad_(False)
    model.cache = []

    def run() -> torch.Tensor:
        model.cache.append(x + 1)
        return model(x).sum()

    assert held_bytes(model, run).total == FLOAT * TOKENS * WIDTH + LOSS


class Embedded(nn.Module):
    """Ids, embedded, through two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(10, WIDTH), TwoLayers()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embed(ids))


def test_the_floor_is_what_the_gradient_needs_on_its_way_down():
    model, ids = Embedded(), torch.arange(TOKENS)
    model.layers.up.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    assert floor_bytes(model, lambda: model(ids).sum()).total == FLOAT * TOKENS * INNER
    assert [p.requires_grad for p in model.parameters()] == before
    assert not model.embed(ids).requires_grad or model.embed.weight.requires_grad
    assert not model.embed._forward_hooks


def test_the_floor_starts_where_it_is_told(model, x):
    assert floor_bytes(model, lambda: model(x).sum(), entry=model.up).total == FLOAT * TOKENS * INNER
    assert floor_bytes(model, lambda: model(x).sum(), entry=model.down).total == 0


def test_the_floor_needs_an_entry_that_is_called(model, x):
    with pytest.raises(SiteError, match="TwoLayers names no input embeddings; pass entry="):
        floor_bytes(model, lambda: model(x).sum())
    with pytest.raises(SiteError, match="never called the entry, Linear"):
        floor_bytes(model, lambda: model(x).sum(), entry=nn.Linear(1, 1))
