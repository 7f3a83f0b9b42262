"""Meta networks beside blocks, and adapting them without labels."""

from __future__ import annotations

import math

import torch

import finegraft as fg
from finegraft.control.confident_entropy import confident_entropy
from finegraft.recipe import Recipe
from finegraft.registry import methods
from tests.models import zoo


def test_the_map_learns_after_one_step_though_the_start_is_the_base():
    """A size of zero before a ReLU would never move; here it moves first, and then the map."""
    model, batch = zoo.build("bert")
    graft = fg.graft(model, "ecotta")
    optimizer = torch.optim.SGD(graft.parameters(), lr=0.1)
    slot = graft.deltas["bert.encoder.layer.0/0.0"]
    for step in range(2):
        optimizer.zero_grad()
        model(**batch, labels=torch.tensor([0, 1])).loss.backward()
        assert slot.size.grad.any()
        assert bool(slot.map.grad.any()) == (step > 0)
        optimizer.step()
    assert slot.map.numel() + 4 * slot.gain.numel() == 32 * 32 + 4 * 32


def test_entropy_counts_sure_samples_only():
    sure, unsure = torch.tensor([5.0, 0.0, 0.0]), torch.tensor([0.1, 0.0, 0.0])
    p = sure.softmax(-1)
    expected = float(-(p * p.log()).sum())
    assert math.isclose(float(confident_entropy(torch.stack([sure, unsure]), 0.4)), expected, rel_tol=1e-5)
    logits = unsure[None].clone().requires_grad_()
    confident_entropy(logits, 0.4).backward()
    assert not logits.grad.any()


def test_a_loop_without_labels_makes_predictions_surer():
    model, batch = zoo.build("bert")
    recipe = Recipe.parse({**methods["ecotta"].data(), "heads": "none"})
    recipe = recipe.model_copy(
        update={"control": Recipe.parse({"control": [{"kind": "confident-entropy", "threshold": 1.0}]}).control}
    )
    graft = fg.graft(model, recipe)
    optimizer = torch.optim.SGD(graft.parameters(), lr=0.05)
    control = fg.Control(graft, optimizer, total_steps=5)
    found = []
    for _ in range(5):
        control.before_step()
        control.after_backward({**batch, "labels": torch.tensor([0, 1])})
        control.before_update()
        optimizer.step()
        optimizer.zero_grad()
        control.after_step()
        with torch.no_grad():
            found.append(float(confident_entropy(model(**batch).logits, 1.0)))
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]
