"""Which units of a recipe's sites train, and by which changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from finegraft.deltas.delta import Delta
from finegraft.errors import NothingFits, RecipeError, SiteError
from finegraft.locate.collection import Sites
from finegraft.locate.site import Site
from finegraft.recipe import Part, Recipe, Select
from finegraft.recipe.select import WHOLE_SITES
from finegraft.registry import scores
from finegraft.select.choose import choose
from finegraft.select.drawing import generator
from finegraft.select.whole_sites import choose_sites, sums_of_sites


class Planned(NamedTuple):
    """Changes at one site.

    Attributes:
        site: with the chosen units.
        deltas: as they are at this site, innermost first.
        part: number of the recipe's part; heads come under the number after the last.
        first: position of the first of them among the part's changes.
    """

    site: Site
    deltas: tuple[Delta, ...]
    part: int
    first: int = 0


def matched(part: Part, found: Sites) -> list[Site]:
    """The sites that a part of a recipe is about; none only where it is optional."""
    wanted = {key: value for key, value in part.where.model_dump().items() if value is not None}
    try:
        return list(found.where(**wanted))
    except NothingFits:
        if not part.optional:
            raise
        return []


@dataclass(frozen=True)
class Chooser:
    """Chooses sites and units for the parts of a recipe.

    Attributes:
        model: the base.
        recipe: the recipe.
        batches: calibration data; None where none was given.
        seed: of the graft.
    """

    model: nn.Module
    recipe: Recipe
    batches: Sequence[Any] | None
    seed: int

    def planned(self, part: Part, found: Sites, number: int) -> tuple[list[Planned], list[str]]:
        """The changes of one part, and the names of sites that its budget gives no unit.

        Raises:
            SiteError: see :func:`finegraft.select.choose.choose`.
            RecipeError: a score that needs batches, and there are none.
        """
        places = matched(part, found)
        if part.select is None or not places:
            return [_changed(site, part, number) for site in places], []
        _require_weights(part.select, places)
        batches = self._batches(part.select, places)
        if part.select.unit in WHOLE_SITES:
            return [_changed(site, part, number) for site in self._whole(part.select, places, number, batches)], []
        chosen = choose(places, part.select, seed=self.seed, part=number, model=self.model, batches=batches)
        planned, left_out = [], []
        for site in places:
            if site.name in chosen:
                own = _changed(replace(site, chosen=chosen[site.name]), part, number)
                planned.append(_instead(own, part))
            elif part.instead is not None and part.instead.share == 0:
                planned.append(_structured(site, part, number))
            else:
                left_out.append(site.name)
        return planned, left_out

    def _whole(self, select: Select, places: list[Site], number: int, batches: Sequence[Any]) -> list[Site]:
        rng = generator(self.seed, "modules", number)
        if select.score == "random":
            return choose_sites(places, select, rng)
        sums = sums_of_sites(self.model, places, select, batches, lambda site: generator(self.seed, site.name, number))
        return choose_sites(places, select, rng, sums)

    def _batches(self, select: Select, places: list[Site]) -> Sequence[Any]:
        score = scores[select.score]
        if score.needs is None:
            return ()
        if self.batches is None:
            labels = " with labels" if score.needs_gradient else ""
            raise RecipeError(
                f"method {self.recipe.name!r} scores by {select.score!r}, which needs data: give "
                f"calibration=, an iterable of batches{labels}"
            )
        for site in places:
            require_parameter(site)
        return self.batches


def listed(calibration: Iterable[Any] | None, recipe: Recipe) -> list[Any] | None:
    """Calibration data as a list, since it may be gone through more than once; not touched where nothing needs it."""
    scored = any(part.select is not None and scores[part.select.score].needs is not None for part in recipe.parts)
    needed = scored or any(delta.needs for part in recipe.parts for delta in part.changes)
    if calibration is None or not needed:
        return None
    return as_list(calibration)


def as_list(calibration: Iterable[Any]) -> list[Any]:
    """Calibration data as a list; :class:`RecipeError` where they are no batches to go through."""
    try:
        return list(calibration)
    except TypeError:
        raise RecipeError(f"calibration is an iterable of batches, not {type(calibration).__name__}") from None


def require_parameter(site: Site) -> None:
    """Raise :class:`SiteError` where a layer's weight is no parameter of its own."""
    if site.kind == "layer" and site.tensor not in site.module._parameters:
        raise SiteError(
            f"{site.name!r} makes its weight anew in each pass (parametrize, weight_norm, spectral_norm): remove "
            "the parametrization, or leave the site out"
        )


def _changed(site: Site, part: Part, number: int) -> Planned:
    return Planned(site, tuple(delta.at(site) for delta in part.what), number)


def _structured(site: Site, part: Part, number: int) -> Planned:
    assert part.instead is not None
    return Planned(site, tuple(delta.at(site) for delta in part.instead.what), number, len(part.what))


def _instead(own: Planned, part: Part) -> Planned:
    """The same, or the part's other changes where the selection took enough of their numbers (SPT)."""
    if part.instead is None:
        return own
    other = _structured(replace(own.site, chosen=None), part, own.part)
    given = sum(delta.count(own.site) for delta in own.deltas)
    return other if given >= part.instead.share * sum(delta.count(other.site) for delta in other.deltas) else own


def _require_weights(select: Select, places: list[Site]) -> None:
    """Raise where a selection looks at weights of sites that have none: sublayers and attention calls."""
    looks = select.unit not in WHOLE_SITES or select.score != "random" or select.parameters or select.bytes
    bare = [site for site in places if not site.tensor]
    if looks and bare:
        raise SiteError(
            f"{bare[0].name!r} is a {bare[0].type} site, which has no weight of its own: unit {select.unit!r} by score "
            f"{select.score!r} needs one. Choose such sites whole, at random, by density or count"
        )
