"""One where x what of a recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, field_validator, model_validator

from finegraft.recipe.select import WHOLE_SITES, Select
from finegraft.recipe.spec import Spec, explain
from finegraft.registry import Registry, controllers, kinds

Names = str | list[str]


class Where(Spec):
    """A query over sites; every element must match, elements ending in ``?`` may be absent, ``!`` excludes.

    Attributes:
        role: what the site does (``q``, ``k``, ``up``, ``norm`` ...); attn and ffn are whole sublayers, input is where
            a stack of blocks takes its sequence (decoder_input of a decoder that reads an encoder).
        layer: block numbers, or ``"0-3"``, ``"last:2"``, ``"first:2"``, ``"first:50%"``, ``"even"``, ``"odd"``.
        name: a glob over site names, or a regular expression after ``re:``.
        type: linear, conv, embedding, norm, tensor, sublayer, attention or input.
        kind: layer, tensor, sublayer, attention or input.
    """

    role: Names | None = None
    layer: int | str | list[int | str] | None = None
    name: Names | None = None
    type: Names | None = None
    kind: Names | None = None


def _entry(registry: Registry, place: str) -> Any:
    """A field that holds a setting of a registered piece, given as data with its ``kind``, or by its name alone."""

    def parse(value: Any) -> Any:
        if isinstance(value, Spec):
            return value
        value = _spelled_out(value)
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            raise ValueError(f"{place}: needs a kind ({', '.join(registry)})")
        settings = {k: v for k, v in value.items() if k != "kind"}
        try:
            return registry[value["kind"]].model_validate(settings)
        except ValidationError as error:
            raise ValueError(explain(error, f"{registry.what} {value['kind']!r}")) from None

    return Annotated[Any, BeforeValidator(parse), PlainSerializer(_data)]


def _spelled_out(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _data(entry: Any) -> dict[str, Any]:
    return {"kind": entry.kind, **entry.model_dump(mode="json", exclude_defaults=True)}


Kind: Any = _entry(kinds, "what")
Controller: Any = _entry(controllers, "control")


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def _trains_units(what: Any) -> bool:
    name = what.get("kind") if isinstance(what, dict) else None
    return isinstance(name, str) and name in kinds and kinds[name].needs_selection


Changes: Any = Annotated[tuple[Kind, ...], BeforeValidator(_as_list), Field(min_length=1)]


class Instead(Spec):
    """Other changes for the sites of which a selection takes much.

    Attributes:
        what: the changes, as in :class:`Part`.
        share: a site changes by them if it was given at least this share of their numbers; 0 does so everywhere.
    """

    what: Changes
    share: Annotated[float, Field(ge=0)]

    @field_validator("what")
    @classmethod
    def _trains_whole_sites(cls, what: tuple[Any, ...]) -> tuple[Any, ...]:
        if selective := next((delta.kind for delta in what if delta.needs_selection), None):
            raise ValueError(f"kind {selective!r} trains chosen units; instead takes kinds that do without")
        return what


class Part(Spec):
    """One where x what of a recipe.

    Attributes:
        where: the sites.
        what: one kind of change, or several that act one upon the other, innermost first; the name alone will do for
            a kind with its default settings.
        select: which parts of each site train, for kinds that train a selection.
        instead: other changes for the sites of which the selection takes much.
        optional: leave the part out, rather than refuse the model, where no site fits.
    """

    where: Where
    what: Changes
    select: Select | None = None
    instead: Instead | None = None
    optional: bool = False

    @model_validator(mode="before")
    @classmethod
    def _select_gives_unit(cls, data: Any) -> Any:
        """A kind that trains chosen units takes what they are from ``select``, so that it is said once."""
        select = data.get("select") if isinstance(data, dict) else None
        select = select if isinstance(select, dict) else {} if select is None else select.model_dump()
        if select.get("unit", WHOLE_SITES[0]) in WHOLE_SITES or "what" not in data:
            return data
        said = {name: select[name] for name in ("unit", "block") if name in select}
        what = [{**said, **w} if _trains_units(w) else w for w in map(_spelled_out, _as_list(data["what"]))]
        return {**data, "what": what}

    @model_validator(mode="after")
    def _fits(self) -> Part:
        selective = [d.kind for d in self.what if d.needs_selection]
        whole = self.select is None or self.select.unit in WHOLE_SITES
        if selective and whole:
            raise ValueError(f"kind {selective[0]!r} needs select: with a unit inside of sites, such as entry")
        if not whole and not selective and self.select is not None:
            names = ", ".join(d.kind for d in self.what)
            raise ValueError(f"select unit {self.select.unit!r} has no use with kind {names}; use kind 'sparse'")
        if self.instead is not None and whole:
            raise ValueError("instead goes by what a selection takes of each site: give select a unit inside of sites")
        for delta in self.what:
            if self.select is not None and delta.needs_selection:
                self._agrees(delta, self.select)
        return self

    @staticmethod
    def _agrees(delta: Any, select: Select) -> None:
        for name in ("unit", "block") if select.unit == "block" else ("unit",):
            own, given = getattr(delta, name), getattr(select, name)
            if own != given:
                raise ValueError(f"kind {delta.kind!r} says {name} {own!r}, select says {given!r}")

    @property
    def changes(self) -> tuple[Any, ...]:
        """All changes that it may put on a site, in the order that counts their positions."""
        return self.what if self.instead is None else (*self.what, *self.instead.what)
