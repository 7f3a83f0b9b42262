"""AdaLoRA against PEFT's: the same outputs, scores, schedule and survivors, given the same parameters and gradients."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import finegraft as fg
from finegraft.control.orthonormality import Orthonormality
from finegraft.control.rank_budget import RankBudget, rank_scores
from finegraft.control.run import Run

RANK, STEPS, TOTAL, WARMUP, FINAL, EVERY = 4, 16, 20, 2, 4, 2
NAMES = {"a": "lora_A", "b": "lora_B", "m": "lora_E"}


class Pair:
    """The same small model under PEFT's AdaLoRA and ours, with random numbers copied over."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        config = peft.AdaLoraConfig(
            init_r=RANK,
            target_r=2,
            lora_alpha=16,
            tinit=WARMUP,
            tfinal=FINAL,
            deltaT=EVERY,
            total_step=TOTAL,
            target_modules=["0", "2"],
            beta1=0.85,
            beta2=0.8,
        )
        self.ours = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        self.ours.load_state_dict(base.state_dict())
        self.theirs = peft.get_peft_model(base, config)
        data = {
            "parts": [{"where": {"type": "linear"}, "what": {"kind": "three-factor", "rank": RANK}}],
            "heads": "none",
            "control": [{"kind": "rank-budget", "keep": 0.5, "warmup": 0.1, "final": 0.2, "every": EVERY}],
        }
        data["control"][0]["spread_decay"] = 0.8
        self.graft = fg.graft(self.ours, data)
        (self.budget,) = self.graft.recipe.control
        optimizer = torch.optim.SGD(self.graft.parameters(), lr=0.1)
        self.run = Run(self.graft, optimizer, total_steps=TOTAL)
        self.x = torch.randn(7, 6)

    def pairs(self):
        """Our parameters, with theirs, and how ours is laid out."""
        layers = {layer.split("model.")[-1]: module for layer, module in self.theirs.named_modules()}
        for slot in self.graft.all_slots:
            for name, theirs in NAMES.items():
                yield getattr(slot, name), getattr(layers[slot.site], theirs)["default"]

    def draw(self) -> None:
        with torch.no_grad():
            for ours, theirs in self.pairs():
                theirs.copy_(torch.randn_like(theirs))
                ours.copy_(theirs.view(ours.shape))

    def backward(self) -> None:
        for model in (self.ours, self.theirs):
            model.zero_grad()
            model(self.x).square().mean().backward()


@pytest.fixture
def pair():
    return Pair()


def test_outputs_and_gradients_are_the_same(pair):
    pair.draw()
    torch.testing.assert_close(pair.ours(pair.x), pair.theirs(pair.x), rtol=2e-5, atol=1e-5)
    pair.backward()
    for ours, theirs in pair.pairs():
        torch.testing.assert_close(ours.grad, theirs.grad.view(ours.shape), rtol=1e-4, atol=1e-4)


def test_budgets_are_those_of_peft_at_every_step(pair):
    allocator = pair.theirs.base_model.rankallocator
    for step in range(1, TOTAL + 1):
        assert pair.budget.budget(step, TOTAL, 2 * RANK) == allocator.budget_schedule(step)[0]


def test_scores_and_survivors_are_those_of_peft(pair):
    allocator = pair.theirs.base_model.rankallocator
    pair.budget.start(pair.run)
    for step in range(1, STEPS + 1):
        pair.draw()
        pair.backward()
        for ours, theirs in pair.pairs():
            theirs.grad.copy_(ours.grad.view(theirs.shape))
        pair.budget.before_update(pair.run)
        pair.run.step = step
        if step < TOTAL - FINAL:
            _, pattern = allocator.update_and_allocate(pair.theirs, step)
        else:
            _, pattern = allocator.update_and_allocate(pair.theirs, step, force_mask=True)
        if pattern is not None and step > WARMUP:
            expected = [flag for flags in pattern.values() for flag in flags]
            scores = torch.cat([rank_scores(pair.run, slot) for slot in pair.graft.all_slots])
            count = pair.budget.budget(step, TOTAL, 2 * RANK)
            assert sorted(scores.argsort(descending=True)[:count].tolist()) == [
                i for i, on in enumerate(expected) if on
            ]
        pair.budget.after_step(pair.run)
        if step < STEPS:
            masks = [(slot.m != 0).tolist() for slot in pair.graft.all_slots]
            if pattern is not None and step > WARMUP:
                assert masks == list(pattern.values())
    assert [slot.delta.rank for slot in pair.graft.all_slots] == [sum(flags) for flags in pattern.values()]
    assert sum(slot.delta.rank for slot in pair.graft.all_slots) == 4
    torch.testing.assert_close(pair.ours(pair.x), pair.theirs(pair.x), rtol=2e-5, atol=1e-5)


def test_the_penalty_is_that_of_peft(pair):
    pair.draw()
    frames = [p @ p.T for _, p in pair.pairs() if p.shape[0] == RANK and p.shape[1] > 1]
    frames += [p.T @ p for _, p in pair.pairs() if p.shape[1] == RANK]
    expected = 0.5 * sum((f - torch.eye(RANK)).norm() for f in frames) / len(frames)
    assert len(frames) == 4
    torch.testing.assert_close(Orthonormality(strength=0.5).penalty(pair.run), expected)


def test_the_schedule_is_cubic_between_its_ends():
    budget = RankBudget(keep=2 / 3, warmup=0.1, final=0.4)
    found = [budget.budget(step, 100, 36) for step in range(101)]
    assert found[:11] == [36] * 11
    assert found[60:] == [24] * 41
    assert found == sorted(found, reverse=True)
    assert found[35] == int(24 + 12 * 0.5**3)
