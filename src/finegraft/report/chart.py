"""Line charts as SVG text, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 16, 12, 44

Points = Sequence[tuple[float, float]]


def line_chart(points: Points, *, title: str, x_label: str, y_label: str, markers: bool = False) -> str:
    """One curve with axes, as an ``<svg>`` element whose description says what it shows.

    Args:
        points: ``(x, y)`` in order of x, at least one; values that are not finite are left out.
        title: for readers who do not see the picture.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        markers: draw each point as a dot that tells its value when pointed at.
    """
    shown = [(x, y) for x, y in points if math.isfinite(y)]
    if not shown:
        return ""
    start, end = min(0.0, shown[0][0]), max(shown[-1][0], 1.0)
    x_ticks = [x for x in ticks(start, end) if start <= x <= end]
    y_ticks = ticks(min(y for _, y in shown), max(y for _, y in shown))

    def across(x: float) -> float:
        return _scaled(x, (start, end), _LEFT, WIDTH - _RIGHT)

    def up(y: float) -> float:
        return _scaled(y, (y_ticks[0], y_ticks[-1]), HEIGHT - _BOTTOM, _TOP)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>' for y in y_ticks
    ]
    parts += [f'<text x="{_LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{_label(y)}</text>' for y in y_ticks]
    parts += [
        f'<text x="{across(x):.1f}" y="{HEIGHT - _BOTTOM + 19}" text-anchor="middle">{_label(x)}</text>'
        for x in x_ticks
    ]
    parts.append(f'<text x="{(_LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (HEIGHT - _BOTTOM) / 2
    turned = f'transform="translate(12 {middle}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {turned}>{escape(y_label)}</text>")
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in shown)
    parts.append(f'<polyline class="curve" points="{path}"/>')
    if markers or len(shown) == 1:
        parts += [
            f'<circle class="dot" cx="{across(x):.1f}" cy="{up(y):.1f}" r="4">'
            f"<title>{escape(x_label)} {_label(x)}: {y:.4g}</title></circle>"
            for x, y in shown
        ]
    (x0, y0), (x1, y1) = shown[0], shown[-1]
    description = f"{y_label} goes from {y0:.4g} at {x_label} {_label(x0)} to {y1:.4g} at {x_label} {_label(x1)}."
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About ``count`` round numbers whose first and last enclose ``low`` and ``high``."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _scaled(value: float, values: tuple[float, float], start: float, end: float) -> float:
    return start + (value - values[0]) / (values[1] - values[0]) * (end - start)


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.4g}"
