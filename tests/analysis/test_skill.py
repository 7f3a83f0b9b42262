"""Skill localization: the mask's laws, and the graft that comes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finegraft.analysis.entries import graft_on_entries
from finegraft.analysis.entry_mask import EntryMask
from finegraft.analysis.skill import localize, localized_table
from finegraft.data.base import load_base
from finegraft.data.task import Task
from finegraft.errors import BaseMismatch, RecipeError, SiteError
from finegraft.locate import sites
from finegraft.run.evaluate import evaluate
from finegraft.run.export import write_merged
from finegraft.run.trained import load_trained
from finegraft.run.tune import tune
from finegraft.store import read
from tests.analysis.conftest import Configure
from tests.run.tiny import write_text_base

_SKILL = {"share": 0.02, "steps": 3, "batches": 2}


@pytest.fixture(scope="module")
def run(text_base: str, tables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration of a finished run of full fine-tuning, and its result merged into a folder."""
    folder = tmp_path_factory.mktemp("full")
    config = {
        "base": text_base,
        "task": {"kind": "classification"},
        "data": {**tables, "test": tables["eval"]},
        "method": "full",
        "train": {"epochs": 4, "batch_size": 8, "lr": 0.005, "precision": "fp32"},
        "out": str(folder / "run"),
    }
    tune(config)
    write_merged(text_base, folder / "run", folder / "merged")
    return {"config": config, "merged": str(folder / "merged"), "run": config["out"], "base": text_base}


def mask_on(layer: nn.Linear, *, patch: float = 0.3) -> EntryMask:
    site = next(iter(sites(nn.Sequential(layer))))
    rng = torch.Generator().manual_seed(0)
    after = site.weight + torch.randn(site.weight.shape, generator=rng, dtype=site.weight.dtype)
    return EntryMask.start(site, after, torch.rand(site.weight.shape, generator=rng) < patch, 10.0, 0)


def test_a_mask_of_zeros_gives_the_base_and_one_of_ones_the_tuned_weight() -> None:
    layer = nn.Linear(6, 5)
    start = layer.weight.detach().clone()
    mask = mask_on(layer)
    for patch, expected in ((0, start), (1, mask.after)):
        replace(mask, patch=torch.full_like(mask.patch, bool(patch))).show(rounded=True)
        assert torch.equal(layer.weight, expected)
    mask.restore()
    assert torch.equal(layer.weight, start)


def test_the_start_lies_close_to_its_patch() -> None:
    mask = mask_on(nn.Linear(6, 5))
    assert torch.equal(mask.rounded(), mask.patch)
    assert float((mask.mask() - mask.patch.float()).abs().max()) < 2e-4


def test_the_analytic_gradient_of_the_mask_is_autograd_s() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    mask = mask_on(layer)
    mask.logits = (torch.randn(5, 6) * 3 + 10).double().requires_grad_()
    x, aim = torch.randn(4, 6).double(), torch.randn(4, 5).double()
    weight = (mask.before + mask.mask() * (mask.after - mask.before)).requires_grad_()
    weight.retain_grad()
    (nn.functional.linear(x, weight) - aim).square().sum().backward()
    expected, of_weight = mask.logits.grad, weight.grad
    assert expected is not None and of_weight is not None
    with torch.no_grad():
        torch.testing.assert_close(mask.gradient(of_weight).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tuned", ["merged", "run"])
def test_the_graft_changes_exactly_its_entries_and_keeps_the_gain(
    run: dict[str, Any], tuned: str, tmp_path: Path
) -> None:
    told: list[str] = []
    found = localize(run[tuned], run["base"], run["config"], out=tmp_path / "skill", tell=told.append, **_SKILL)
    metrics = json.loads((tmp_path / "skill" / "localize.json").read_text())
    assert metrics == found.metrics
    assert len(told) == len(metrics["history"]) == 4
    assert metrics["eval"]["tuned"] >= 0.9
    assert metrics["eval"]["graft"] > metrics["eval"]["base"]
    assert metrics["test"]["graft"] == metrics["eval"]["graft"]
    assert metrics["history"][0]["entries"] == round(0.02 * metrics["of"])
    assert localized_table(metrics).row_count == 11

    base = load_base(run["base"], Task(kind="classification"), labels=["blame", "praise"]).model
    trained = load_trained(tmp_path / "skill")
    trained.graft.merge()
    differing = {
        site.name: int((site.weight != sites(base)[site.name].weight).sum())
        for site in sites(trained.model)
        if site.parameter is not None and site.role != "head"
    }
    tensors, _ = read(tmp_path / "skill" / "graft")
    chosen = {name.partition("/")[0]: len(t) for name, t in tensors.items() if name.endswith("index")}
    assert {name: count for name, count in differing.items() if count} == chosen
    assert sum(chosen.values()) == metrics["entries"]


def test_the_graft_scores_as_it_says_when_it_is_loaded(run: dict[str, Any], tmp_path: Path) -> None:
    found = localize(run["merged"], run["base"], run["config"], out=tmp_path / "skill", **_SKILL)
    scored = evaluate(tmp_path / "skill", run["config"]["data"]["eval"])
    assert scored["accuracy"] == found.metrics["eval"]["graft"]


def test_without_steps_what_moved_most_is_kept(run: dict[str, Any], tmp_path: Path) -> None:
    found = localize(run["merged"], run["base"], run["config"], out=tmp_path / "skill", share=0.01, steps=0)
    assert found.metrics["entries"] == round(0.01 * found.metrics["of"])
    moved = load_base(run["merged"], Task(kind="classification"), labels=["blame", "praise"]).model
    theirs, chosen, left = sites(moved), [], []
    found.graft.detach()
    tensors, _ = read(found.out / "graft")
    for site in sites(load_base(run["base"], Task(kind="classification"), labels=["blame", "praise"]).model):
        if site.parameter is None or site.role in ("embed", "head"):
            continue
        gap = (theirs[site.name].weight - site.weight).abs().flatten()
        inside = torch.zeros(len(gap), dtype=torch.bool)
        if (index := tensors.get(f"{site.name}/0.0/index")) is not None:
            inside[index] = True
        chosen.append(gap[inside])
        left.append(gap[~inside])
    assert float(torch.cat(chosen).min()) >= float(torch.cat(left).max())


def test_the_search_moves_the_mask_and_keeps_the_best(run: dict[str, Any], tmp_path: Path) -> None:
    settings = {"share": 0.002, "steps": 6, "batches": 1, "lr": 1e9}
    metrics = localize(run["merged"], run["base"], run["config"], out=tmp_path / "skill", **settings).metrics
    scores = [look["score"] for look in metrics["history"]]
    assert len({look["entries"] for look in metrics["history"]}) > 1
    assert scores[metrics["best_step"]] == max(scores)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "share is a part of all entries"),
        ({"share": 1.5}, "share is a part of all entries"),
        ({"steps": -1}, "steps is a whole number from 0 up"),
        ({"batches": 0}, "batches is a whole number from 1 up"),
        ({"lr": 0.0}, "lr is a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        localize("tuned", "base", {}, out=tmp_path / "skill", **settings)


def test_what_is_no_state_of_the_base_is_refused(
    run: dict[str, Any], configure: Configure, text_base: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="was not tuned for classification"):
        localize(text_base, text_base, run["config"], out=tmp_path / "skill")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="neither a tuned model nor a graft"):
        localize(tmp_path / "empty", text_base, run["config"], out=tmp_path / "skill")
    with pytest.raises(BaseMismatch, match="does not differ from the base"):
        localize(run["merged"], run["merged"], run["config"], out=tmp_path / "skill")
    (tmp_path / "skill").mkdir()
    (tmp_path / "skill" / "mine.txt").touch()
    with pytest.raises(RecipeError, match="not empty"):
        localize(run["merged"], text_base, run["config"], out=tmp_path / "skill")


def test_given_entries_have_to_fit_their_site() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SiteError, match="do not fit"):
        graft_on_entries(model, {"0": torch.tensor([16])})
    with pytest.raises(SiteError, match="no entries"):
        graft_on_entries(model, {"0": torch.tensor([], dtype=torch.int64)})
    with pytest.raises(SiteError, match="no site is named"):
        graft_on_entries(model, {"1": torch.tensor([0])})
    values = {"0": torch.tensor([2.0])}
    before = model[0].weight.detach().clone()
    given = graft_on_entries(model, {"0": torch.tensor([5])}, values)
    given.merge()
    assert (model[0].weight - before).flatten().nonzero().tolist() == [[5]]


def test_a_base_of_another_shape_is_refused(run: dict[str, Any], tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    write_text_base(tmp_path / "wide")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=14, max_position_embeddings=32, **shape)).save_pretrained(
        tmp_path / "wide"
    )
    with pytest.raises(BaseMismatch, match="no state of the base"):
        localize(tmp_path / "wide", run["base"], run["config"], out=tmp_path / "skill")


def test_the_room_is_reached_from_the_package() -> None:
    import finegraft as fg

    assert fg.analysis.localize is localize
    assert all(callable(getattr(fg.analysis, name)) for name in dir(fg.analysis))
