"""What a saved graft says about itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from finegraft.errors import StoreError
from finegraft.grafting.slot import changes_nothing
from finegraft.locate.find import exactly, sites
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
    _warn_if_without_effect(graft)
    return Manifest(
        recipe=_recipe(graft),
        seed=graft.seed,
        fingerprint=fingerprint,
        sites=[
            {"site": slot.site, "part": slot.place[0], "position": slot.place[1], "kind": slot.delta.kind}
            for slot in graft.all_slots
        ],
        task=None if task is None else _document(task, "task"),
        metrics={name: _finite(value) for name, value in _document(metrics or {}, "metrics").items()},
        provenance={
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "libraries": {library: _version(library) for library in _LIBRARIES},
            "trained": graft.num_trainable,
        },
    )


def _recipe(graft: Graft) -> dict[str, Any]:
    """The recipe as data; its roles by the names they matched, so that loading evaluates no pattern from a file."""
    data = graft.recipe.data()
    if graft.recipe.roles:
        inferred = {site.name: site.role for site in sites(graft.model)}
        given = [site for site in sites(graft.model, roles=graft.recipe.roles) if site.kind in ("layer", "tensor")]
        data["roles"] = {exactly(site.name): site.role for site in given if site.role != inferred[site.name]}
    return data


def _warn_if_without_effect(graft: Graft) -> None:
    slots = [(placement.site, slot) for placement in graft.placements for slot in placement.slots]
    # Merged, a change such as a mask can already show in the weight it is held against
    if not graft.merged and changes_nothing(slots):
        warnings.warn(
            "the graft changes nothing, as before it was trained; fg.load will refuse it",
            RuntimeWarning,
            stacklevel=4,
        )


def _document(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise StoreError(f"{what} should be a mapping of names to JSON values, not {type(values).__name__}")
    return {_key(key, what): _plain(value, f"{what}.{key}") for key, value in values.items()}


def _key(key: Any, what: str) -> str:
    if not isinstance(key, str):
        raise StoreError(f"{what}: the key {key!r} is {type(key).__name__}; JSON has text for keys")
    return key


def _plain(value: Any, what: str) -> Any:
    """The value as JSON has it: arrays and tensors of one number become that number."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return _document(value, what)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{what}[{number}]") for number, item in enumerate(value)]
    number = value.item() if getattr(value, "shape", None) == () else None
    if type(number) in (bool, int, float, str):
        return number
    raise StoreError(f"{what} is {type(value).__name__}, which JSON cannot hold: give numbers, text, lists or mappings")


def _finite(value: Any) -> Any:
    # JSON has no NaN; a run that diverged must still be savable.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"
