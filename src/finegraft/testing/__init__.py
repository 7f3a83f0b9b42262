"""The laws that every kind of change and every method must keep: a conformance suite that any package can run.

``check_kind("my-kind")`` and ``check_method("my-method", build)`` hold a registered kind or method against all of them;
``capabilities()`` finds out what each method can do. The checks draw settings with hypothesis, of the extra
``testing``; the rest needs nothing beyond finegraft.
"""

from __future__ import annotations

import importlib
from typing import Any

from finegraft.errors import MissingExtra

_PLACES = {
    "BASES": "finegraft.testing.bases",
    "Base": "finegraft.testing.bases",
    "Case": "finegraft.testing.case",
    "LAWS": "finegraft.testing.laws",
    "capabilities": "finegraft.testing.capability_table",
    "capabilities_table": "finegraft.testing.capability_table",
    "check_kind": "finegraft.testing.conformance",
    "check_method": "finegraft.testing.conformance",
    "held_bytes": "finegraft.testing.memory",
    "saved_bytes": "finegraft.testing.memory",
    "settings": "finegraft.testing.drawn_settings",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'finegraft.testing' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PLACES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise MissingExtra(
            f"finegraft.testing.{name} needs hypothesis: install it with pip install 'finegraft[testing]'"
        ) from None


def __dir__() -> list[str]:
    return __all__
