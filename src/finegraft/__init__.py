"""finegraft: train a small part of a frozen model, and get a graft that can be saved, loaded, mixed and merged."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "graft": "finegraft.grafting.make",
    "load": "finegraft.grafting.load",
    "materialise": "finegraft.grafting.materialising",
    "nearest_tasks": "finegraft.grafting.tasks",
    "Graft": "finegraft.grafting.graft",
    "Control": "finegraft.control.driver",
    "fuse": "finegraft.grafting.fusing",
    "grafts": "finegraft.grafting.merging",
    "merge": "finegraft.grafting.merging",
    "merge_adapters": "finegraft.grafting.fusing",
    "route": "finegraft.grafting.route",
    "quantise": "finegraft.grafting.quantising",
    "dequantise": "finegraft.grafting.quantising",
    "shrink": "finegraft.grafting.shrinking",
    "proxy": "finegraft.grafting.proxy",
    "sites": "finegraft.locate.find",
    "start_from": "finegraft.grafting.start_from",
    "truncate": "finegraft.grafting.ranks",
    "truncated": "finegraft.grafting.ranks",
    "Recipe": "finegraft.recipe",
    "methods": "finegraft.catalogue.listing",
    "weigh": "finegraft.grafting.weighing",
    "tune": "finegraft.run.tune",
    "evaluate": "finegraft.run.evaluate",
    "predict": "finegraft.run.predict",
    "FinegraftError": "finegraft.errors",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name == "analysis":
        return importlib.import_module("finegraft.analysis")
    if name not in _PLACES:
        raise AttributeError(f"module 'finegraft' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
