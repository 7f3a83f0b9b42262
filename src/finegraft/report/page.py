"""The page: figures, curves, what was grafted, and what it was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined

from finegraft.report.chart import line_chart

_SHADES = 5


@dataclass(frozen=True)
class GraftedSite:
    """One changed place of the base.

    Args:
        name: the site.
        role: what it does, such as ``q`` or ``up``.
        layer: number of its block; None outside blocks.
        kind: of the change, such as ``low-rank``.
        trained: parameters that train there.
    """

    name: str
    role: str
    layer: int | None
    kind: str
    trained: int


@dataclass(frozen=True)
class RunReport:
    """Everything that a report shows.

    Args:
        title: the heading.
        summary: names and values of the figures, in order.
        losses: ``(step, loss)`` of training.
        scores: ``(step, value)`` of the headline metric on the evaluation rows.
        headline: name of that metric.
        sites: what was grafted.
        metrics: rows ``(name, before, after)`` of every metric, as text.
        documents: name and text of what the run was made with, such as its configuration.
        environment: versions and hardware.
        notes: sentences about decisions that were taken.
    """

    title: str
    summary: Sequence[tuple[str, str]]
    losses: Sequence[tuple[float, float]]
    scores: Sequence[tuple[float, float]]
    headline: str
    sites: Sequence[GraftedSite]
    metrics: Sequence[tuple[str, str, str]] = ()
    documents: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Cell:
    shade: int
    trained: int
    detail: str


def render_report(report: RunReport) -> str:
    """The report as one self-contained HTML page, for light and dark displays."""
    page = Environment(loader=PackageLoader("finegraft.report", "."), autoescape=True, undefined=StrictUndefined)
    layers, roles = _grid(report.sites)
    return page.get_template("page.html.jinja").render(
        report=report,
        layers=layers,
        roles=roles,
        kinds=sorted({site.kind for site in report.sites}),
        loss_chart=line_chart(report.losses, title="Training loss", x_label="step", y_label="loss"),
        score_chart=line_chart(
            report.scores,
            title=f"{report.headline} on the evaluation rows",
            x_label="step",
            y_label=report.headline,
            markers=True,
        ),
    )


def _grid(sites: Sequence[GraftedSite]) -> tuple[list[int | None], dict[str, list[_Cell | None]]]:
    """Roles by layers: what trains in each cell, shaded by its share of the largest cell."""
    layers: list[int | None] = [*sorted({site.layer for site in sites if site.layer is not None})]
    if any(site.layer is None for site in sites):
        layers.append(None)
    cells: dict[tuple[str, int | None], list[GraftedSite]] = {}
    for site in sites:
        cells.setdefault((site.role, site.layer), []).append(site)
    most = max((_trained(group) for group in cells.values()), default=0)
    roles: dict[str, list[_Cell | None]] = {}
    for role in dict.fromkeys(site.role for site in sites):
        row = [cells.get((role, layer)) for layer in layers]
        roles[role] = [None if group is None else _cell(group, most) for group in row]
    return layers, roles


def _cell(group: Sequence[GraftedSite], most: int) -> _Cell:
    trained = _trained(group)
    shade = 1 + round((_SHADES - 1) * trained / most) if most else 1
    return _Cell(shade, trained, "; ".join(f"{site.name}: {site.kind}, {site.trained:,}" for site in group))


def _trained(group: Sequence[GraftedSite]) -> int:
    return sum(site.trained for site in group)
