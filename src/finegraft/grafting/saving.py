"""What a saved graft says about itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finegraft.errors import StoreError
from finegraft.grafting.results import named_changes, results
from finegraft.grafting.slot import Slot, changes_nothing, stored_tensors
from finegraft.grafting.stack import Placement, stack_of
from finegraft.locate.find import exactly, sites
from finegraft.select.drawing import drawn_units
from finegraft.store import Manifest

if TYPE_CHECKING:
    from finegraft.grafting.graft import Graft

_LIBRARIES = ("finegraft", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Contents:
    """What a file holds of a graft.

    Attributes:
        tensors: by ``site/part.position/name``.
        sites: for each change its place and kind; its ``sizes``, where they are not the recipe's; whether its units are
            ``drawn`` again rather than stored; under ``results``, names of the tensors that hold weights instead of
            changes.
    """

    tensors: dict[str, Tensor]
    sites: list[dict[str, Any]]


def contents_of(graft: Graft) -> Contents:
    """The tensors of a graft in the form in which they take least, and the list that says where they belong."""
    stack = stack_of(graft.model)
    alone = stack is not None and stack.grafts == [graft]
    tensors: dict[str, Tensor] = {}
    listed: list[dict[str, Any]] = []
    for placement in graft.placements:
        for slot in placement.slots:
            entry = {"site": slot.site, "part": slot.place[0], "position": slot.place[1], "kind": slot.delta.kind}
            own = stored_tensors(slot, placement.site)
            if slot.delta.rank_axes and not any(tensor.numel() for tensor in own.values()):
                continue  # no rank is left
            if sizes := graft.resized(slot):
                entry["sizes"] = sizes
            if _is_drawn(graft, slot, own, placement):
                entry["drawn"] = True
            if alone and len(placement.slots) == 1 and (found := _results(slot, own, placement)):
                own |= found
                entry["results"] = sorted(found)
            if "drawn" in entry:
                del own["index"]
            tensors |= {f"{slot.key}/{name}": tensor for name, tensor in own.items()}
            listed.append(entry)
    return Contents(tensors, listed)


def _is_drawn(graft: Graft, slot: Slot, own: Mapping[str, Tensor], placement: Placement) -> bool:
    """Whether the units in a file would be those that the seed draws."""
    part, _ = slot.place
    select = graft.recipe.parts[part].select if slot.delta.needs_selection else None
    drawn = None if select is None else drawn_units(placement.site, select, graft.seed, part)
    return drawn is not None and torch.equal(drawn, own["index"].cpu())


def _results(slot: Slot, own: Mapping[str, Tensor], placement: Placement) -> dict[str, Tensor]:
    if not slot.delta.in_place:
        return {}
    as_loaded = SimpleNamespace(**slot.delta.working(placement.site), **own)
    changes = named_changes(slot.delta.changes(as_loaded), own.items())
    found = {name: results(change, placement.site, placement.chain) for name, change in changes}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def manifest_of(
    graft: Graft,
    listed: list[dict[str, Any]],
    *,
    task: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
) -> Manifest:
    """The manifest of a graft: recipe, base, places (``Contents.sites``) and provenance."""
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
        sites=listed,
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
