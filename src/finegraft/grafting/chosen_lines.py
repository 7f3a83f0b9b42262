"""What a selection chose, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finegraft.grafting.stack import Placement
from finegraft.recipe import Part

_SHOWN = 3


def chosen_lines(
    placements: Iterable[Placement], left_out: Sequence[str] = (), parts: Sequence[Part] = ()
) -> list[str]:
    """A line for each unit with what was chosen per role, one for what settled, one for the sites that got another
    change instead, and one for those that got nothing.
    """
    counts: dict[str, dict[str, list[int]]] = {}
    settled, others = 0, dict[str, None]()
    for placement in placements:
        for slot in placement.slots:
            if slot.delta.needs_selection:
                units = slot.delta.units(slot.index)
                count = counts.setdefault(units.unit, {}).setdefault(placement.site.role, [0, 0])
                count[0] += len(units.index)
                count[1] += units.number(placement.site.matrix_shape)
                settled += len(slot.settled_index)
            elif slot.place[0] < len(parts) and slot.place[1] >= len(parts[slot.place[0]].what):
                others[placement.site.name] = None
    lines = [
        f"{_PLURALS[unit]} chosen: " + ", ".join(f"{role} {own:,} of {all_:,}" for role, (own, all_) in roles.items())
        for unit, roles in counts.items()
    ]
    if settled:
        lines.append(f"settled, in force without training on: {settled:,}")
    if others:
        lines.append(f"changed by another kind instead, as much of them was chosen: {_listed(list(others))}")
    if left_out:
        lines.append(f"left out, as nothing in them was chosen: {_listed(left_out)}")
    return lines


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


_PLURALS = {"entry": "entries", "row": "rows", "column": "columns", "block": "blocks"}
