"""What a saved graft says about itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from finegraft.store import Manifest

if TYPE_CHECKING:
    from finegraft.grafting.graft import Graft

_LIBRARIES = ("finegraft", "torch", "transformers", "safetensors")


def manifest_of(graft: Graft, *, task: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None) -> Manifest:
    """The manifest of a graft: recipe, base, places and provenance."""
    name = getattr(getattr(graft.model, "config", None), "_name_or_path", None)
    fingerprint = graft.fingerprint
    if name and not fingerprint.name:
        fingerprint = fingerprint.model_copy(
            update={"name": str(name).replace("\\", "/").rstrip("/").rpartition("/")[2]}
        )
    return Manifest(
        recipe=graft.recipe.data(),
        seed=graft.seed,
        fingerprint=fingerprint,
        sites=[
            {"site": slot.site, "part": slot.place[0], "position": slot.place[1], "kind": slot.delta.kind}
            for slot in graft.all_slots
        ],
        task=None if task is None else dict(task),
        metrics={name: _finite(value) for name, value in (metrics or {}).items()},
        provenance={
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "libraries": {library: _version(library) for library in _LIBRARIES},
            "trained": graft.num_trainable,
        },
    )


def _finite(value: Any) -> Any:
    # JSON has no NaN; a run that diverged must still be savable.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"
