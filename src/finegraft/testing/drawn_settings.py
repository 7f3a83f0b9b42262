"""Small settings of any kind of change, drawn by hypothesis from its typed fields."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from finegraft.deltas.delta import Delta
from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.registry import inits, kinds

LARGEST_INT = 4
"""Ranks, widths and lengths stay below every dimension of the bases."""

LARGEST_FLOAT = 0.5
"""Of numbers without an upper bound whose default is zero."""

SHARES = (1.0, 0.5, 2.0)
"""Of the default, for other numbers without an upper bound."""


WRAPPED: dict[str, dict[str, Any]] = {
    "bottleneck": {"width": 2},
    "low-rank": {"rank": 1},
    "scale-shift": {},
    "prefix": {"length": 2},
}
"""Drawn for a field ``of`` that holds another kind: together they go on every type of site."""


def settings(kind: type[Delta], site: Site | None = None) -> st.SearchStrategy[Delta]:
    """Settings of a kind, its defaults cut to small sizes among them.

    Literals, booleans, bounded numbers, optionals, names of registered inits in a field ``init: str``, and kinds in a
    field ``of`` are drawn; a field of any other type keeps its default. Combinations that the kind itself rejects are
    left out.

    Args:
        kind: the class.
        site: leave out settings that do not fit this site.
    """
    fields = {
        name: strategy for name, field in kind.model_fields.items() if (strategy := _field(name, field)) is not None
    }
    drawn: st.SearchStrategy[Any] = st.fixed_dictionaries(fields).map(lambda values: _made(kind, values))
    return drawn.filter(lambda delta: delta is not None and (site is None or fits(delta, site)))


def fits(delta: Delta, site: Site) -> bool:
    """Whether a kind with these settings is defined on a site."""
    try:
        delta.fits(site)
    except SiteError:
        return False
    return True


def _made(kind: type[Delta], values: dict[str, Any]) -> Delta | None:
    try:
        delta = kind(**values)
        return delta if delta.needs is None else None  # the bases of kinds have no data to calibrate on
    except ValidationError:
        return None


def _field(name: str, field: FieldInfo) -> st.SearchStrategy[Any] | None:
    if name == "init" and field.annotation is str:
        return st.sampled_from(list(inits))
    if name == "of":
        return st.sampled_from([kinds[wrapped](**given) for wrapped, given in WRAPPED.items()])
    if field.annotation is float and field.default and not any(isinstance(b, (Lt, Le)) for b in field.metadata):
        return st.sampled_from([share * field.default for share in SHARES])
    return _typed(field.annotation, field.metadata)


def _typed(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any] | None:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _typed(get_args(annotation)[0], [*get_args(annotation)[1:], *metadata])
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if origin in (Union, types.UnionType):
        known = [s for a in get_args(annotation) if a is not type(None) and (s := _typed(a, metadata)) is not None]
        return (
            st.one_of(st.none(), *known) if type(None) in get_args(annotation) else st.one_of(*known) if known else None
        )
    if annotation is bool:
        return st.booleans()
    low, high, open_low, open_high = _bounds(metadata)
    if annotation is int:
        start = 0 if low is None else int(low) + open_low
        end = LARGEST_INT if high is None else min(int(high) - open_high, LARGEST_INT)
        return st.integers(start, max(start, end))
    if annotation is float:
        least = 0.0 if low is None else low
        most = LARGEST_FLOAT if high is None else min(high, LARGEST_FLOAT)
        values = [least + share * (most - least) for share in (0.125, 0.0, 0.5, 1.0)]
        return st.sampled_from(
            [v for v in values if (v > least or not open_low) and (v < most or high is None or not open_high)]
        )
    return None


def _bounds(metadata: list[Any]) -> tuple[float | None, float | None, bool, bool]:
    low: Any = None
    high: Any = None
    open_low = open_high = False
    for bound in metadata:
        if isinstance(bound, (Gt, Ge)):
            low, open_low = (bound.gt, True) if isinstance(bound, Gt) else (bound.ge, False)
        if isinstance(bound, (Lt, Le)):
            high, open_high = (bound.lt, True) if isinstance(bound, Lt) else (bound.le, False)
    return low, high, open_low, open_high
