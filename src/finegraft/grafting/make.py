"""From a recipe and a model to a graft."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from finegraft.deltas.replacement import Replacement
from finegraft.errors import RecipeError, SiteError
from finegraft.grafting.attach import place
from finegraft.grafting.choosing import Chooser, Planned, listed, require_parameter
from finegraft.grafting.graft import Graft
from finegraft.grafting.peers import with_peers
from finegraft.grafting.previous import start_from
from finegraft.grafting.sources import with_sources
from finegraft.grafting.stack import Stack, bare, stack_of
from finegraft.grafting.starting import fresh_changes
from finegraft.locate.collection import Sites
from finegraft.locate.find import sites
from finegraft.locate.site import Site
from finegraft.recipe import Recipe
from finegraft.registry import methods


def graft(
    model: nn.Module,
    method: str | Mapping[str, Any] | Recipe,
    *,
    calibration: Iterable[Any] | None = None,
    previous: Graft | str | Path | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Graft:
    """Put a new graft on a model. It is in force at once; its tensors are the only ones that train.

    Args:
        model: any ``torch.nn.Module``.
        method: a name from ``fg.methods()``, ``{"name": ..., setting: value}``, a whole recipe as data, a
            :class:`Recipe`, or the path of a ``.yaml`` recipe.
        calibration: batches for ``model(**batch)``, for methods that look at data; with labels, for gradients.
        previous: a graft, or the folder of a saved one, from whose tensors changes of the same kind at the same site
            start; its base may hold other values.
        seed: for all random starts and random choices; the same seed gives the same graft.
        **overrides: settings to replace wherever the recipe has them: ``rank=8``, ``density=0.01``, ``lr=1e-4`` ...

    Raises:
        RecipeError: unknown method or setting, contradictory settings, missing calibration, batches that the model
            refuses, or a previous graft that does not fit. The model is untouched then.
        SiteError: a query that matches nothing, or a change that does not fit a site. The model is untouched then.

    Example:
        >>> import finegraft as fg
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> fg.graft(model, "lora", rank=2).num_trainable
        52
    """
    model, seed = bare(model), _whole(seed)
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise RecipeError(
            "tensors made under torch.inference_mode() cannot train: graft and load the base outside of it"
        )
    if (stack := stack_of(model)) is not None:
        stack.require_no_route()
    recipe = resolve(method, **overrides)
    found = sites(model, roles=recipe.roles)
    stack = stack or Stack(model)
    batches = listed(calibration, recipe)
    planned, left_out = plan(recipe, found, model, calibration=batches, seed=seed)
    slots = fresh_changes(with_sources(planned, stack), model, stack, batches, seed)
    if previous is not None:
        start_from(previous, slots, stack.base)
    made = place(stack, recipe, seed, slots)
    made.left_out = tuple(left_out)
    return made


def _whole(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise RecipeError(f"a seed is a whole number, not {seed!r}") from None


def resolve(method: str | Mapping[str, Any] | Recipe, **overrides: Any) -> Recipe:
    """The recipe that a method's name, data or path stands for, with settings replaced."""
    if isinstance(method, Mapping) and "parts" not in method:
        data = dict(method)
        if "name" not in data:
            raise RecipeError(f"a method needs a name, or parts of its own; found {sorted(data)}")
        method, overrides = str(data.pop("name")), {**data, **overrides}
    if isinstance(method, str) and method.endswith((".yaml", ".yml")):
        recipe = Recipe.load(Path(method))
    else:
        recipe = methods[method] if isinstance(method, str) else Recipe.parse(method)
    return recipe.override(**overrides) if overrides else recipe


class Plan(NamedTuple):
    """What a recipe does to a model.

    Attributes:
        changes: site by site; heads come last, under a part number after the recipe's own.
        left_out: names of matched sites of which no unit was chosen.
    """

    changes: list[Planned]
    left_out: list[str]


def plan(
    recipe: Recipe, found: Sites, model: nn.Module, *, calibration: Iterable[Any] | None = None, seed: int = 0
) -> Plan:
    """Sites with their changes; units are chosen, everything is checked."""
    chooser = Chooser(model, recipe, listed(calibration, recipe), seed)
    changes: list[Planned] = []
    left_out: list[str] = []
    for number, part in enumerate(recipe.parts):
        planned, without = chooser.planned(part, found, number)
        changes += planned
        left_out += without
    changes += _heads(recipe, found, {change.site.name for change in changes})
    if not changes:
        raise SiteError(
            f"recipe {recipe.name!r} trains nothing on this model: it has no parts, and the model has no head"
        )
    peers = with_peers(((change.part, change.first), change.site) for change in changes)
    changes = [change._replace(site=site) for change, site in zip(changes, peers, strict=True)]
    for change in changes:
        require_parameter(change.site)
        for delta in change.deltas:
            delta.fits(change.site)
    return Plan(changes, left_out)


def _heads(recipe: Recipe, found: Sites, taken: set[str]) -> list[Planned]:
    heads = _matched_heads(recipe, found)
    if double := next((site.name for site in heads if site.name in taken), None):
        raise SiteError(
            f"{double!r} is a head, which is trained whole anyway: exclude it (role: '!head'), or set heads: none"
        )
    return [Planned(site, (Replacement(),), len(recipe.parts)) for site in heads]


def _matched_heads(recipe: Recipe, found: Sites) -> list[Site]:
    if recipe.heads == "none":
        return []
    if recipe.heads == "auto":
        return [site for site in found if site.role == "head" and site.kind in ("layer", "tensor")]
    return list(found.where(name=list(recipe.heads)))
