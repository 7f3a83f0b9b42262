"""The choice of what trains: groups of sites, recipes, and the inner trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finegraft.analysis.pareto import Reward
from finegraft.analysis.subsets import Measured, pareto_table, search_subset
from finegraft.errors import RecipeError
from finegraft.grafting import graft
from finegraft.recipe import Recipe
from finegraft.registry import methods
from finegraft.run.tune import tune
from finegraft.store import read
from tests.analysis.conftest import Configure, storyteller
from tests.run.tiny import rows_of, write_rows

SHORT = {"steps": 3}


def test_it_trains_subsets_and_keeps_the_best_recipes(configure: Configure) -> None:
    told: list[str] = []
    config = configure(method="lora", train=SHORT)
    found = search_subset(config, trials=3, tell=told.append)
    assert [reward.name for reward in found.rewards] == ["accuracy", "share"]
    assert list(found.groups) == ["encoder.layer 0", "encoder.layer 1"] or len(found.groups) == 3
    data = json.loads((found.out / "subsets.json").read_text())
    assert [trial["best"] for trial in data["trials"]] == [trial in found.best for trial in found.trials]
    assert len(told) == len(found.trials) == 3
    files = sorted((found.out / "pareto").iterdir())
    assert [Recipe.load(file) for file in files] == found.recipes
    assert pareto_table(found).row_count >= len(found.best)
    again = search_subset(config, trials=3)
    assert (again.trials, again.best) == (found.trials, found.best)


def test_all_groups_together_are_the_method_itself(configure: Configure) -> None:
    found = search_subset(configure(method="lora", train=SHORT), trials=1)
    plain = tune(configure(out="plain", method="lora", train=SHORT))
    assert found.recipes == [methods["lora"].override(lr=0.02)]
    folder = found.out / "subsets" / ("1" * len(found.groups))
    first, second = (read(run / "graft")[0] for run in (folder, plain.out))
    assert all(torch.equal(first[name], second[name]) for name in second) and first.keys() == second.keys()
    assert found.trials[0].values[0] == plain.metrics["after"]["accuracy"]


def test_sites_of_groups_that_are_left_out_take_no_gradient(configure: Configure) -> None:
    groups = {
        "attention": "*attention*",
        "first": ["bert.encoder.layer.0.intermediate*", "bert.encoder.layer.0.output*"],
    }
    found = search_subset(configure(method="lora", train=SHORT), groups=groups, trials=3)
    assert {trial.subset for trial in found.trials} == {(True, True), (True, False), (False, True)}
    for trial in found.trials:
        folder = found.out / "subsets" / "".join("01"[taken] for taken in trial.subset)
        trained = {name.partition("/")[0] for name in read(folder / "graft")[0]}
        for taken, members in zip(trial.subset, found.groups.values(), strict=True):
            assert set(members) <= trained if taken else not set(members) & trained


def test_a_narrowed_recipe_fits_the_model_again(configure: Configure) -> None:
    found = search_subset(configure(method="lora", train=SHORT), ["share"], groups="role", trials=4)
    (best,) = found.best
    assert len(found.trials) == 4
    narrow = found.recipes[0]
    assert sum(best.subset) < len(found.groups)
    names = {name for part in narrow.parts for name in part.where.name or ()}
    assert names == {
        site for taken, members in zip(best.subset, found.groups.values(), strict=True) if taken for site in members
    }


def test_rewards_may_be_functions_of_the_finished_run(configure: Configure) -> None:
    small = Measured(Reward("bytes", higher_is_better=False), lambda run: float(run.metrics["graft_bytes"]))
    loss = Measured(Reward("loss", higher_is_better=False), lambda run: run.metric("loss"))
    found = search_subset(configure(method="lora", train=SHORT), [small, loss], trials=2)
    assert found.trials[1].values[0] < found.trials[0].values[0]


def test_preserved_is_the_score_on_other_rows(configure: Configure, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "other.jsonl", rows_of("classification", 10, 7))
    found = search_subset(configure(method="lora", train=SHORT), preserve=rows, trials=1)
    assert [reward.name for reward in found.rewards] == ["accuracy", "preserved"]
    assert 0 <= found.trials[0].values[1] <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": "block"}, "groups are 'layer', 'role', or globs by name"),
        ({"groups": {"a": "nowhere.*"}}, "'nowhere.\\*' fits no site of the method"),
        ({"groups": {"a": "*query", "b": "*attention*"}}, "is in two groups, 'a' and 'b'"),
        ({"rewards": ["preserved"]}, "needs preserve="),
        ({"rewards": ["bleu"]}, "unknown reward 'bleu'; known: accuracy, f1"),
        ({"method": "head"}, "trains heads only"),
    ],
)
def test_what_cannot_be_searched_is_refused(configure: Configure, settings: dict[str, Any], message: str) -> None:
    config = configure(method=settings.pop("method", "lora"), train=SHORT)
    with pytest.raises(RecipeError, match=message):
        search_subset(config, settings.pop("rewards", ()), **settings)


def test_frozen_groups_have_no_gradient_in_a_plain_loop() -> None:
    recipe = methods["lora"].data()
    recipe["parts"][0]["where"] = {"name": ["model.layers.0.self_attn.q_proj"], "kind": ["layer"]}
    model = storyteller()
    narrow = graft(model, recipe)
    text = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=text, labels=text).loss.backward()
    own = {id(parameter) for parameter in narrow.parameters()}
    assert {id(p) for p in model.parameters() if p.grad is not None} == own
