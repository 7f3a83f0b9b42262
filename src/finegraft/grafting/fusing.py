"""Several trained adapters made one: fused by attention over them, or merged into one adapter."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from finegraft.deltas.bottleneck import Bottleneck
from finegraft.errors import MissingExtra, RecipeError
from finegraft.grafting.graft import Graft
from finegraft.grafting.make import graft, resolve
from finegraft.grafting.merging import grafts as grafts_on
from finegraft.grafting.slot import Slot
from finegraft.recipe import Recipe

Align = Literal["none", "transport"]

_HELD = ("down", "down_bias", "up", "up_bias")


@torch.no_grad()
def fuse(
    model: nn.Module, grafts: Sequence[Graft], method: str | Mapping[str, Any] | Recipe = "adapter-fusion"
) -> Graft:
    """A new graft whose attention goes over the adapters of others; these are switched off, and may be detached.

    Args:
        model: the model that all of them are on.
        grafts: trained grafts of serial, dense bottlenecks of one width, on the same sites.
        method: a recipe with one part of kind ``adapter-fusion``; its sites and sizes become those of the adapters.

    Raises:
        RecipeError: grafts that differ in sites or settings, are of other kinds, or not on the model; nothing is
            changed then.
    """
    tables = _tables(model, grafts)
    (delta,) = _settings(grafts)
    if (delta.placement, delta) != ("serial", _plain(delta)):
        raise RecipeError("adapters are fused if they are serial and dense, without experts, gates or convolutions")
    data = resolve(method).data()
    if len(data["parts"]) != 1 or data["parts"][0]["what"][0]["kind"] != "adapter-fusion":
        raise RecipeError(
            f"to fuse takes a recipe of one part, of kind 'adapter-fusion'; {data.get('name')!r} has others"
        )
    sizes = {"adapters": len(grafts), "width": delta.width, "activation": delta.activation, "scale": delta.scale}
    data["parts"][0]["what"][0] |= sizes
    data["parts"][0]["where"] = {"name": list(tables[0]), "kind": next(iter(_kinds(grafts[0])))}
    made = graft(model, data)
    for slot in (slot for slot in made.all_slots if slot.delta.kind == "adapter-fusion"):
        for name in _HELD:
            getattr(slot, name).copy_(torch.stack([getattr(table[slot.site], name) for table in tables]))
    for one in grafts:
        one.enabled = False
    return made


@torch.no_grad()
def merge_adapters(model: nn.Module, grafts: Sequence[Graft], *, align: Align = "transport", seed: int = 0) -> Graft:
    """A new graft of the first one's recipe that is the mean of several, to be trained on (MerA).

    The others are switched off, and may be detached.

    Args:
        model: the model that all of them are on.
        grafts: trained grafts of dense bottlenecks with the same settings, on the same sites.
        align: ``transport`` permutes the hidden units of each adapter, by the optimal assignment of the weights around
            them, to those of the first (He et al. 2023, arXiv:2308.15982); ``none`` takes plain means.
        seed: of what is not merged, such as new heads.

    Raises:
        RecipeError: grafts that differ in sites or settings, are of other kinds, or not on the model; nothing is
            changed then.
    """
    if align not in get_args(Align):
        raise RecipeError(f"align is one of {', '.join(get_args(Align))}, not {align!r}")
    tables = _tables(model, grafts)
    (delta,) = _settings(grafts)
    if align == "transport" and delta != _plain(delta):
        raise RecipeError("transport aligns dense adapters, without experts, gates or convolutions; use align='none'")
    assign = _assignment() if align == "transport" else None
    merged: dict[str, dict[str, Tensor]] = {}
    for site in tables[0]:
        held: list[dict[str, Tensor]] = [dict(table[site].named_parameters()) for table in tables]
        if assign is not None:
            held[1:] = [_permuted(one, _order(held[0], one, assign)) for one in held[1:]]
        merged[site] = {name: torch.stack([one[name] for one in held]).mean(dim=0) for name in held[0]}
    made = graft(model, grafts[0].recipe, seed=seed)
    for slot in _adapters(made):
        for name, tensor in merged[slot.site].items():
            getattr(slot, name).copy_(tensor)
    for one in grafts:
        one.enabled = False
    return made


def _adapters(one: Graft) -> list[Slot]:
    return [slot for slot in one.all_slots if slot.delta.kind == "bottleneck"]


def _kinds(one: Graft) -> set[str]:
    own = {slot.site for slot in _adapters(one)}
    return {placement.site.kind for placement in one.placements if placement.site.name in own}


def _tables(model: nn.Module, grafts: Sequence[Graft]) -> list[dict[str, Slot]]:
    """The adapters of each graft by their sites."""
    if not isinstance(grafts, (list, tuple)) or not grafts:
        raise RecipeError(f"adapters come as a list of grafts on the model, not {grafts!r}")
    there = grafts_on(model)
    for i, one in enumerate(grafts):
        if one not in there:
            raise RecipeError(f"{one!r} is no graft on this model; it has {there}")
        if one in grafts[:i]:
            raise RecipeError(f"{one!r} is given twice")
    tables = [{slot.site: slot for slot in _adapters(one)} for one in grafts]
    if not tables[0] or any(table.keys() != tables[0].keys() for table in tables):
        raise RecipeError(
            f"grafts need bottleneck adapters on the same sites: they have {[len(table) for table in tables]} of them"
        )
    if any(len(table) != len(_adapters(one)) for table, one in zip(tables, grafts, strict=True)):
        raise RecipeError("grafts with several adapters on one site cannot be told apart: give one on each")
    return tables


def _settings(grafts: Sequence[Graft]) -> set[Bottleneck]:
    found = {slot.delta.model_dump_json(): slot.delta for one in grafts for slot in _adapters(one)}
    if len(found) > 1:
        raise RecipeError(f"the adapters have different settings: {'; '.join(sorted(found))}")
    return set(found.values())


def _plain(delta: Bottleneck) -> Bottleneck:
    """The adapter of the same size with nothing but two dense maps."""
    kept = ("width", "placement", "activation", "scale", "init", "dropout")
    return Bottleneck(**{name: getattr(delta, name) for name in kept})


def _order(first: dict[str, Tensor], other: dict[str, Tensor], assign: Any) -> Tensor:
    """Which hidden unit of the other stands where each of the first is."""
    cost = torch.cdist(_units(first), _units(other)).double().cpu().numpy()
    _, columns = assign(cost)
    return torch.as_tensor(columns, device=first["down"].device)


def _units(p: dict[str, Tensor]) -> Tensor:
    """Weights around each hidden unit: what it reads, its bias, and what reads it."""
    return torch.cat([p["down"], p["down_bias"].unsqueeze(-1), p["up"].T], dim=1)


def _permuted(p: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    return {**p, "down": p["down"][order], "down_bias": p["down_bias"][order], "up": p["up"][:, order]}


def _assignment() -> Any:
    try:
        return importlib.import_module("scipy.optimize").linear_sum_assignment
    except ImportError:
        raise MissingExtra(
            "adapters are aligned by transport with SciPy: pip install 'finegraft[solvers]', or take align='none'"
        ) from None
