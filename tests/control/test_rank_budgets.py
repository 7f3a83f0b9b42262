"""Ranks that move while a graft trains, and the penalties that go with them: what the papers' sheets say."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

import finegraft as fg
from finegraft.errors import RecipeError, StoreError
from finegraft.grafting import Graft, ranks
from finegraft.grafting.ranks import set_ranks, truncate, truncated
from finegraft.store import read, write


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def put(model: nn.Module, what, **recipe) -> Graft:
    return fg.graft(model, {"parts": [{"where": {"role": "!head?"}, "what": what}], "heads": "none", **recipe})


@torch.no_grad()
def shake(graft: Graft) -> None:
    for parameter in graft.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))


class TestSetRanks:
    @pytest.mark.parametrize("middle", ["diagonal", "full"])
    def test_kept_ranks_keep_values_and_moments(self, middle):
        model, x = net(), torch.randn(3, 6)
        graft = put(model, {"kind": "three-factor", "rank": 4, "middle": middle})
        shake(graft)
        optimizer = torch.optim.AdamW(graft.parameters(), lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
        slot, kept = graft.all_slots[0], torch.tensor([1, 3])
        before = {name: t.detach().clone() for name, t in slot.tensors()}
        moments = {name: optimizer.state[t]["exp_avg"].clone() for name, t in slot.named_parameters()}
        held, scale = dict(slot.named_parameters()), slot.delta.alpha / slot.delta.rank
        set_ranks(graft, slot, kept, added=1, rng=torch.Generator(), optimizer=optimizer)
        assert slot.delta.rank == 3
        assert slot.delta.alpha / slot.delta.rank == pytest.approx(scale)
        for name, axes in slot.delta.rank_axes.items():
            now, old, moment = getattr(slot, name), before[name], moments[name]
            assert now is held[name]
            state = optimizer.state[now]["exp_avg"]
            for axis in axes:
                now, state = now.narrow(axis, 0, 2), state.narrow(axis, 0, 2)
                old, moment = old.index_select(axis, kept), moment.index_select(axis, kept)
            assert torch.equal(now, old)
            assert torch.equal(state, moment)
            assert optimizer.state[held[name]]["exp_avg"].shape == held[name].shape
        model(x).square().sum().backward()
        optimizer.step()

    def test_a_new_rank_changes_nothing(self):
        model, x = net(), torch.randn(3, 6)
        graft = put(model, {"kind": "three-factor", "rank": 2, "middle": "full"})
        shake(graft)
        with torch.no_grad():
            before = model(x)
            for slot in graft.all_slots:
                set_ranks(graft, slot, torch.arange(2), added=2, rng=torch.Generator())
            torch.testing.assert_close(model(x), before)

    def test_what_cannot_move_says_so(self):
        graft = put(net(), "bias")
        with pytest.raises(RecipeError, match="kind 'bias' on '0' has no ranks"):
            set_ranks(graft, graft.all_slots[0], torch.arange(1))
        with pytest.raises(RecipeError, match="has no ranks to cut: its kinds are bias"):
            truncate(graft, 1)
        graft = put(net(), {"kind": "triplets", "rank": 3})
        with pytest.raises(RecipeError, match="only the last ranks can be dropped"):
            set_ranks(graft, graft.all_slots[0], torch.tensor([0, 2]))
        with pytest.raises(RecipeError, match="ranks 0 to 2"):
            set_ranks(graft, graft.all_slots[0], torch.tensor([0, 3]))


class TestTruncate:
    @pytest.mark.parametrize(
        "what",
        [
            {"kind": "low-rank", "rank": 4},
            {"kind": "low-rank", "rank": 4, "init": "pissa", "scaling": "alpha/sqrt(r)"},
            {"kind": "triplets", "rank": 4},
            {"kind": "core", "rank": 4},
            {"kind": "three-factor", "rank": 4, "middle": "full"},
            {"kind": "masked-low-rank", "rank": 4},
            {"kind": "block-low-rank", "rank": 4, "blocks": 2},
        ],
        ids=str,
    )
    def test_a_truncated_graft_is_one_of_that_rank(self, what, tmp_path):
        model, x = net(), torch.randn(3, 6)
        graft = put(model, what)
        shake(graft)
        whole = model(x).detach()
        with truncated(graft, 2):
            cut = model(x).detach()
            path = graft.save(tmp_path / "two")
            state = graft.state()
        assert torch.equal(model(x), whole)
        assert not torch.allclose(cut, whole)
        other = net()
        small = fg.load(path, other, trainable=True)
        assert all(slot.delta.rank == 2 for slot in small.all_slots)
        torch.testing.assert_close(other(x), cut)
        torch.testing.assert_close(other(x), fg_at_rank_two(what, graft)(x))
        graft.load_state({name: tensor.clone() for name, tensor in state.items()})
        torch.testing.assert_close(model(x), cut)
        assert small.num_trainable == graft.num_trainable


def fg_at_rank_two(what, graft: Graft) -> nn.Module:
    """A fresh graft of rank 2 with the leading ranks of another's tensors."""
    model = net()
    other = put(model, {**what, "rank": 2})
    with torch.no_grad():
        for mine, theirs in zip(other.all_slots, graft.all_slots, strict=True):
            for name, tensor in mine.tensors():
                tensor.copy_(getattr(theirs, name)[tuple(slice(0, n) for n in tensor.shape)])
    return model


def test_the_example_runs():
    assert doctest.testmod(ranks).failed == 0


@pytest.mark.parametrize("tampered", [{"rank": 3}, {"rank": -1, "alpha": 16.0}, {"rank": 5, "alpha": 16.0}, 3])
def test_sizes_that_do_not_fit_the_file_are_refused(tampered, tmp_path):
    graft = truncate(put(net(), {"kind": "low-rank", "rank": 4}), 2)
    shake(graft)
    path = graft.save(tmp_path / "graft")
    tensors, manifest = read(path)
    manifest.sites[0]["sizes"] = tampered
    write(tmp_path / "other", tensors, manifest, card="")
    with pytest.raises(StoreError):
        fg.load(tmp_path / "other", net())


def test_a_state_that_a_truncated_graft_cannot_take_leaves_it_as_it_is():
    graft = put(net(), {"kind": "triplets", "rank": 4})
    state = {name: tensor.clone() for name, tensor in graft.state().items()}
    truncate(graft, 2)
    before = {name: tensor.clone() for name, tensor in graft.state().items()}
    with pytest.raises(StoreError, match="the state has 4 ranks; of 's' only 2 are left"):
        graft.load_state(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in graft.state().items())


def test_an_optimizer_trains_on_at_the_truncated_rank():
    model = net()
    graft = put(model, {"kind": "low-rank", "rank": 4})
    optimizer = torch.optim.AdamW(graft.parameters())
    for cut in (4, 2):
        truncate(graft, cut, optimizer=optimizer)
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in graft.parameters())


@pytest.mark.parametrize("call", [lambda x: truncate(x, 2), lambda x: fg.weigh(x, None).__enter__()])
def test_what_is_no_graft_is_told(call):
    with pytest.raises(RecipeError, match="takes a graft, as fg.graft and fg.load give it, not a Sequential"):
        call(nn.Sequential())


@pytest.mark.parametrize(
    ("control", "what", "words"),
    [
        ({"kind": "freeze-by-score"}, {"kind": "low-rank", "rank": 2}, "nothing trains but tensors named a or b"),
        ({"kind": "rank-growth", "times": 2}, {"kind": "low-rank", "rank": 2}, "is quantised and has none"),
        ({"kind": "row-rates"}, {"kind": "bias"}, "there is no matrix that trains"),
    ],
)
def test_controllers_that_cannot_act_say_so_before_the_first_step(control, what, words):
    graft = put(fg.quantise(net()), what, control=[control])
    running = fg.Control(graft, torch.optim.AdamW(graft.parameters()), total_steps=10)
    with pytest.raises(RecipeError, match=words):
        running.before_step()


def test_a_graft_merged_while_truncated_has_all_ranks_merged_afterwards():
    model, x = net(), torch.ones(2, 6)
    graft = put(model, {"kind": "low-rank", "rank": 4})
    shake(graft)
    expected = model(x)
    with truncated(graft, 2):
        graft.merge()
    torch.testing.assert_close(model(x), expected)
    graft.unmerge()
    assert torch.equal(model(x), expected)
    with truncated(graft, 2):
        cut = model(x)
        fg.merge(model)
    torch.testing.assert_close(model(x), cut)
