"""Numbers as people read them."""

from __future__ import annotations


def in_bytes(count: float) -> str:
    """A size with a decimal unit, such as ``1.2 MB``."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def in_time(seconds: float) -> str:
    """A duration, such as ``12.3 s`` or ``4 min 05 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def in_figures(value: float | None) -> str:
    """A metric with four decimals."""
    return "no number" if value is None else f"{value:.4f}"
