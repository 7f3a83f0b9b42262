"""Starting from a former graft."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finegraft as fg
from finegraft.errors import BaseMismatch, RecipeError


def network(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def trained(model, method="lora", **settings):
    graft = fg.graft(model, method, **settings)
    with torch.no_grad():
        for p in graft.parameters():
            p.add_(torch.randn_like(p))
    return graft


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_tensors_are_those_of_the_former_graft(tmp_path, saved, method):
    former = trained(network(), method, rank=2)
    if saved:
        former.save(tmp_path / "former")
    model = network(seed=1)  # another checkpoint of the same architecture
    graft = fg.graft(model, method, rank=2, previous=tmp_path / "former" if saved else former)
    for new, old in zip(graft.all_slots, former.all_slots, strict=True):
        own = dict(new.tensors())
        assert all(torch.equal(own[name], tensor) for name, tensor in old.tensors())


def test_sites_without_a_former_change_start_fresh():
    former = trained(network(), {"parts": [{"where": {"name": "0"}, "what": {"kind": "low-rank", "rank": 2}}]})
    fresh = fg.graft(network(), "lora", rank=2)
    graft = fg.graft(network(), "lora", rank=2, previous=former)
    first, second = graft.all_slots
    assert torch.equal(first.b, former.all_slots[0].b) and torch.equal(second.a, fresh.all_slots[1].a)


@pytest.mark.parametrize(
    ("former", "model", "error", "words"),
    [
        (lambda: trained(network(), rank=3), network, RecipeError, "give it the same settings, such as rank"),
        (lambda: trained(network(), "hra"), network, RecipeError, "no change of the same kind at any of these sites"),
        (lambda: trained(network(), rank=2), lambda: network(width=6), BaseMismatch, "another architecture"),
    ],
)
def test_what_does_not_fit_says_so_and_changes_nothing(former, model, error, words):
    base = model()
    with pytest.raises(error, match=words):
        fg.graft(base, "lora", rank=2, previous=former())
    assert type(base[0]) is nn.Linear


@pytest.mark.parametrize(("end", "words"), [("merge", "is merged"), ("detach", "was detached")])
def test_a_graft_takes_over_tensors_only_where_they_act(tmp_path, end, words):
    path = trained(network(), rank=2).save(tmp_path / "former")
    graft = trained(network(), rank=2)
    getattr(graft, end)()
    before = {name: p.clone() for name, p in graft.named_parameters()}
    with pytest.raises(RecipeError, match=words):
        fg.start_from(graft, path)
    assert all(torch.equal(before[name], p) for name, p in graft.named_parameters())
