"""Controllers of adapters: pruning before training, the rate of tokens, averages, two passes."""

from __future__ import annotations

import pytest
import torch

import finegraft as fg
from finegraft.control.prune_at_start import PruneAtStart, chosen, matrices
from finegraft.control.two_passes import symmetric_divergence
from finegraft.errors import RecipeError
from finegraft.testing.base_models import Classifier

SCORES = ("random", "magnitude", "sensitivity", "fisher", "grasp", "synflow", "erdos-renyi")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier(8, 16, 4, depth=2, classes=3)


def batch():
    return {"ids": torch.arange(20).view(4, 5) % 11, "labels": torch.tensor([0, 1, 2, 0])}


def trained(model, recipe, *, steps=4, **settings):
    graft = fg.graft(model, recipe, **settings)
    optimizer = torch.optim.AdamW(graft.parameter_groups(), lr=1e-2, weight_decay=0.1)
    control = fg.Control(graft, optimizer, total_steps=steps, loss=lambda one: model(**one)["loss"])
    for _ in range(steps):
        control.before_step()
        (model(**batch())["loss"] + control.penalty()).backward()
        control.after_backward(batch())
        control.before_update()
        optimizer.step()
        optimizer.zero_grad()
        control.after_step()
    control.finish()
    return graft, control


class TestPruning:
    @pytest.mark.parametrize("score", SCORES)
    def test_what_is_pruned_stays_zero_and_the_rest_is_as_much_as_was_said(self, model, score):
        graft, _ = trained(model, "sparse-adapter", score=score, density=0.3, width=4)
        found = [p for slot in graft.all_slots if slot.delta.kind == "bottleneck" for p in (slot.down, slot.up)]
        kept, numbers = sum(int((p != 0).sum()) for p in found), sum(p.numel() for p in found)
        assert kept == int(0.3 * numbers)

    def test_large_sparse_keeps_as_much(self, model):
        graft, _ = trained(model, "large-sparse-adapter", steps=1)
        kept = sum(int((p != 0).sum()) for s in graft.all_slots if s.delta.kind == "bottleneck" for p in (s.down, s.up))
        assert kept == 2 * 2 * (2 * 8 * 16)

    def test_scores_that_are_all_zero_are_an_error(self, model):
        with pytest.raises(RecipeError, match="init: bert"):
            trained(model, "sparse-adapter", init="lora", scope="tensor")

    def test_rounds_reach_the_density_step_by_step(self):
        assert PruneAtStart(density=0.25, rounds=2).densities() == [0.5, 0.25]
        assert PruneAtStart(density=0.4, rounds=3, schedule="linear").densities() == pytest.approx([0.8, 0.6, 0.4])

    def test_what_an_earlier_round_pruned_stays_pruned(self):
        scores = {"w": torch.tensor([[3.0, 2.0, 1.0, 0.0]])}
        kept = {"w": torch.tensor([[False, True, True, True]])}
        assert chosen(scores, kept, 0.5, "model")["w"].tolist() == [[False, True, True, False]]

    def test_an_unknown_score_is_named(self):
        with pytest.raises(ValueError, match="no score to prune by is named 'snip'"):
            PruneAtStart(score="snip")

    def test_heads_are_left_alone(self, model):
        graft = fg.graft(model, "sparse-adapter")
        run = type("Run", (), {"graft": graft})
        assert not [name for name in matrices(run) if "classifier" in name]


def test_the_penalty_on_the_rate_is_zero_where_it_is_met(model):
    graft = fg.graft(model, "dyt", heads="none")
    control = fg.Control(graft, torch.optim.SGD(graft.parameters(), lr=0.1), total_steps=2)
    control.before_step()
    model.eval()
    model(**batch())
    assert float(control.penalty()) == pytest.approx(2 * 0.5**2)  # all gates are open at the start
    assert control.penalty() == 0.0  # gates are of one pass
    for slot in (slot for slot in graft.all_slots if slot.delta.kind == "token-router"):
        slot.offset.data.fill_(-1.0)
    model(**batch())
    share = 1 / 5  # the first token always goes through
    assert float(control.penalty()) == pytest.approx(2 * (share - 0.5) ** 2)


def test_training_ends_at_the_average_of_its_steps(model):
    graft, control = trained(model, "r-adapter", momentum=0.5)
    memory = control.memory("weight-average")
    for name, parameter in graft.named_parameters():
        if f"average/{name}" in memory:
            assert torch.equal(parameter, memory[f"average/{name}"])
    graft.merge()


def test_two_passes_agree_at_no_cost():
    first, second = torch.randn(2, 6, 3, requires_grad=True)
    assert float(symmetric_divergence(first, first.detach().clone())) == pytest.approx(0, abs=1e-7)
    p, q = first.softmax(-1), second.softmax(-1)
    expected = ((p - q) * (p.log() - q.log())).sum(-1).mean() / 2
    torch.testing.assert_close(symmetric_divergence(first, second), expected)


def test_values_stay_near_the_identity(model):
    graft = fg.graft(model, "adapter-fusion", heads="none", width=4)
    control = fg.Control(graft, torch.optim.SGD(graft.parameters(), lr=0.1), total_steps=2)
    control.before_step()
    assert float(control.penalty()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        graft.all_slots[0].to_value.add_(torch.eye(8))
    assert float(control.penalty()) == pytest.approx(0.01 * 8, rel=1e-3)


def test_experts_train_with_two_passes(model):
    graft, _ = trained(model, "mosa", width=8)
    assert all(slot.up.any() for slot in graft.all_slots if slot.delta.kind == "bottleneck")
