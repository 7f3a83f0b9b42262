"""MemControl's choice of what trains: an outer search over groups of sites, an inner tuning, two rewards or more.

Dutt et al. 2024, "MemControl: Mitigating Memorization in Diffusion Models via Automated Parameter Selection"
(arXiv:2405.19458), for any method, model and rewards.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from finegraft.analysis.pareto import Reward, SamplerName, Subset, Trial, pareto, search
from finegraft.analysis.repeated import FinishedRun, Tell, run_once
from finegraft.data.base import load_base
from finegraft.data.labels import label_names
from finegraft.data.metrics import SCORINGS
from finegraft.data.read import read_data
from finegraft.errors import RecipeError
from finegraft.grafting.make import resolve
from finegraft.locate import sites
from finegraft.locate.collection import Sites
from finegraft.locate.site import Site
from finegraft.recipe import Recipe
from finegraft.registry import nearest
from finegraft.run.config import TuneConfig
from finegraft.run.config_file import as_config
from finegraft.run.evaluate import evaluate
from finegraft.run.folder import write_json, write_text

SHARE, PRESERVED = "share", "preserved"
_LOWER_IS_BETTER = (SHARE, "loss", "perplexity", "mse")
TRIALS = 20


@dataclass(frozen=True)
class Measured:
    """A reward, and how a finished run is measured.

    Attributes:
        reward: its name and direction.
        of: the number of a run; it may look at everything in ``run.out``, such as the trained graft.
    """

    reward: Reward
    of: Callable[[FinishedRun], float]


@dataclass(frozen=True)
class SubsetSearch:
    """What :func:`search_subset` found.

    Attributes:
        out: folder with the runs, ``subsets.json``, and ``pareto/`` with the recipes of the best.
        groups: names of the groups of sites, each with the names of its sites.
        rewards: what the runs were judged by.
        trials: every subset that was trained, the whole first.
        best: those that no other beats in one reward without losing in another.
        recipes: of the best, in the same order.
    """

    out: Path
    groups: Mapping[str, tuple[str, ...]]
    rewards: tuple[Reward, ...]
    trials: list[Trial]
    best: list[Trial]
    recipes: list[Recipe]


def search_subset(
    config: TuneConfig | Mapping[str, Any] | str | Path,
    rewards: Sequence[str | Measured] = (),
    *,
    groups: str | Mapping[str, str | Sequence[str]] = "layer",
    preserve: str | None = None,
    trials: int = TRIALS,
    sampler: SamplerName = "tpe",
    tell: Tell | None = None,
) -> SubsetSearch:
    """Searches for the groups of sites that had best train, by tuning different subsets of them.

    Subset by subset the method is tuned on the sites of the chosen groups alone; all groups together are the method
    itself. Heads always train. Runs lie in folders under ``config.out`` and finished trials in its journal: interrupted
    and called again, the search goes on where it was and comes to the same result.

    Args:
        config: of the inner tuning.
        rewards: at least one: a metric on the evaluation rows (``accuracy`` ...), ``share`` (trained share of the
            parameters, the lower the better), ``preserved`` (headline metric on ``preserve``), or :class:`Measured`.
            By default the headline metric, and ``preserved`` if there is something to preserve, else ``share``.
        groups: ``layer`` (one group a block), ``role``, or globs over site names by a name of your own. Sites in no
            group always train.
        preserve: labelled rows of another kind that should not get worse, in any form that ``data.eval`` takes.
        trials: subsets to train; default 20.
        sampler: ``tpe`` (default), ``nsga2`` or ``random``.
        tell: takes a line about each trial.

    Raises:
        MissingExtra: Optuna is not installed.
        RecipeError: groups that match nothing or overlap, an unknown reward, or a folder of another search.
        TrainingInterrupted: Ctrl-C; call again to continue.
    """
    config = as_config(config)
    recipe = resolve(config.method, **({} if config.train.lr is None else {"lr": config.train.lr}))
    if not recipe.parts:
        raise RecipeError(f"method {recipe.name!r} trains heads only; there is nothing to choose from")
    matched = _matched(recipe, _sites(config, recipe))
    named = _groups(groups, [site for part in matched for site in part])
    measures = _measures(rewards, config, preserve)
    settled, names = config, list(named)

    def on(subset: Subset) -> Recipe:
        chosen = {name for name, taken in zip(names, subset, strict=True) if taken}
        return narrowed(recipe, matched, named, chosen)

    def run(subset: Subset) -> FinishedRun:
        folder = Path(settled.out) / "subsets" / "".join("01"[taken] for taken in subset)
        return run_once(settled.model_copy(update={"method": on(subset).data(), "out": str(folder)}))

    found_rewards = tuple(measured.reward for measured in measures)
    out = Path(config.out)
    done = search(
        names,
        lambda subset: [measured.of(finished) for finished in [run(subset)] for measured in measures],
        found_rewards,
        trials=trials,
        sampler=sampler,
        seed=config.seed,
        journal=out / "journal.log",
        tell=None if tell is None else lambda trial: tell(_line(trial, names, found_rewards)),
    )
    best = pareto(done, found_rewards)
    result = SubsetSearch(out, named, found_rewards, done, best, [on(trial.subset) for trial in best])
    _write(result)
    return result


def pareto_table(found: SubsetSearch) -> Table:
    """The best subsets: what they leave out, and their rewards; the whole method, if it is not among them, last."""
    table = Table("recipe", "groups", "left out", *(reward.name for reward in found.rewards))
    for number, trial in enumerate(found.best):
        table.add_row(f"pareto/{number}.yaml", *_described(trial, list(found.groups)))
    if found.trials[0] not in found.best:
        table.add_section()
        table.add_row("the method itself", *_described(found.trials[0], list(found.groups)))
    return table


def narrowed(
    recipe: Recipe,
    matched: Sequence[Sequence[Site]],
    groups: Mapping[str, tuple[str, ...]],
    chosen: set[str],
) -> Recipe:
    """The recipe on the sites of the chosen groups, and on those in no group; with all chosen, the recipe itself.

    Args:
        recipe: what is narrowed.
        matched: the sites that each of its parts matches.
        groups: names of sites by group.
        chosen: names of groups.
    """
    left_out = {site for name, members in groups.items() if name not in chosen for site in members}
    if not left_out:
        return recipe
    data = recipe.data()
    parts = []
    for part, places in zip(data["parts"], matched, strict=True):
        kept = [site for site in places if site.name not in left_out]
        if kept:
            kinds = sorted({site.kind for site in kept})
            parts.append({**part, "where": {"name": [site.name for site in kept], "kind": kinds}})
    return Recipe.parse({**data, "parts": parts})


def _sites(config: TuneConfig, recipe: Recipe) -> Sites:
    labels = label_names(config.task, read_data(config.task, config.data))
    base = load_base(config.base, config.task, labels=labels, seed=config.seed)
    return sites(base.model, roles=recipe.roles)


def _matched(recipe: Recipe, found: Sites) -> list[list[Site]]:
    wheres = [part.where.model_dump(exclude_none=True) for part in recipe.parts]
    return [list(found.where(**where)) for where in wheres]


def _groups(groups: str | Mapping[str, str | Sequence[str]], places: Sequence[Site]) -> dict[str, tuple[str, ...]]:
    """Names of sites by group; no site in two of them."""
    found: dict[str, dict[str, None]] = {}
    if isinstance(groups, str):
        if groups not in ("layer", "role"):
            raise RecipeError(f"groups are 'layer', 'role', or globs by name, not {groups!r}")
        for site in places:
            found.setdefault(_place(site) if groups == "layer" else site.role, {})[site.name] = None
        return {name: tuple(members) for name, members in found.items()}
    names = list(dict.fromkeys(site.name for site in places))
    taken: dict[str, str] = {}
    for group, globs in groups.items():
        for glob in [globs] if isinstance(globs, str) else globs:
            members = fnmatch.filter(names, glob)
            if not members:
                raise RecipeError(f"group {group!r}: {glob!r} fits no site of the method, such as {names[0]!r}")
            for member in members:
                if taken.setdefault(member, group) != group:
                    raise RecipeError(f"{member!r} is in two groups, {taken[member]!r} and {group!r}")
                found.setdefault(group, {})[member] = None
    return {name: tuple(members) for name, members in found.items()}


def _place(site: Site) -> str:
    if site.layer is None:
        return "elsewhere"
    return f"{site.stack.replace('.#', '')} {site.layer}"


def _measures(rewards: Sequence[str | Measured], config: TuneConfig, preserve: str | None) -> list[Measured]:
    asked = list(rewards) or ["headline", PRESERVED if preserve else SHARE]
    return [reward if isinstance(reward, Measured) else _measure(reward, config, preserve) for reward in asked]


def _measure(name: str, config: TuneConfig, preserve: str | None) -> Measured:
    if name == SHARE:
        return Measured(
            Reward(SHARE, higher_is_better=False),
            lambda run: run.metrics["trainable_parameters"] / run.metrics["parameters"],
        )
    if name in ("headline", PRESERVED):
        metric = SCORINGS[config.task.kind].headline
        higher = metric not in _LOWER_IS_BETTER
        if name == "headline":
            return Measured(Reward(metric, higher), lambda run: run.metric(metric))
        if preserve is None:
            raise RecipeError("the reward 'preserved' needs preserve=, rows that should not get worse")
        size = config.train.eval_batch_size
        return Measured(Reward(PRESERVED, higher), lambda run: evaluate(run.out, preserve, batch_size=size)[metric])
    if name not in (metrics := SCORINGS[config.task.kind].metrics):
        raise RecipeError(f"unknown reward {name!r}; {nearest(name, [*metrics, SHARE, PRESERVED, 'headline'])}")
    return Measured(Reward(name, name not in _LOWER_IS_BETTER), lambda run: run.metric(name))


def _line(trial: Trial, names: Sequence[str], rewards: Sequence[Reward]) -> str:
    chosen, left_out, *values = _described(trial, names)
    figures = ", ".join(f"{reward.name} {value}" for reward, value in zip(rewards, values, strict=True))
    return f"{chosen} groups: {figures}" + (f" (without {left_out})" if left_out else "")


def _described(trial: Trial, names: Sequence[str]) -> list[str]:
    left_out = [name for name, taken in zip(names, trial.subset, strict=True) if not taken]
    return [f"{sum(trial.subset)} of {len(names)}", ", ".join(left_out), *(f"{value:.5g}" for value in trial.values)]


def _write(found: SubsetSearch) -> None:
    names = [reward.name for reward in found.rewards]
    write_json(
        found.out / "subsets.json",
        {
            "groups": {name: list(members) for name, members in found.groups.items()},
            "rewards": [{"name": r.name, "higher_is_better": r.higher_is_better} for r in found.rewards],
            "trials": [
                {
                    "groups": [name for name, taken in zip(found.groups, trial.subset, strict=True) if taken],
                    **dict(zip(names, trial.values, strict=True)),
                    "best": trial in found.best,
                }
                for trial in found.trials
            ],
        },
    )
    folder = found.out / "pareto"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    for number, recipe in enumerate(found.recipes):
        write_text(folder / f"{number}.yaml", recipe.to_yaml())
