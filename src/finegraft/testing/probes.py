"""One short trial for every verb of a graft."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.grafting.graft import Graft
from finegraft.grafting.load import load
from finegraft.grafting.merging import grafts
from finegraft.grafting.route import route
from finegraft.recipe import Recipe
from finegraft.testing.case import Case, attach, close, identical, only, outputs
from finegraft.testing.loop import Loop

CLOSE = 1e-5

_LAYERS = {"type": ["linear?", "conv?"], "role": "!head"}

COMPANION = Recipe.parse(
    {"name": "companion", "parts": [{"where": _LAYERS, "what": {"kind": "low-rank", "rank": 2}}], "heads": "none"}
)
"""A graft of another method, to be put beside the one under trial."""


class NothingToDoError(Exception):
    """Mathematics leaves nothing to do for a verb; the message says why."""


def train(case: Case) -> None:
    """Steps on a batch lower the loss."""
    trial = case.start()
    losses = Loop(trial, lambda batch: trial.model(**batch)["loss"], steps=20, weight_decay=None).run()
    assert min(losses) < losses[0], f"the loss stays at {losses[0]:.4g}"


def save(case: Case) -> None:
    """A file gives the same outputs on a fresh base."""
    trial = case.trained()
    model, batch = case.base.build()
    with tempfile.TemporaryDirectory() as folder:
        load(trial.graft.save(Path(folder) / "graft"), model)
    close(outputs(model, batch), trial.output(), CLOSE)


def merge(case: Case) -> None:
    """The base's own tensors give the outputs of the graft."""
    trial = case.trained()
    before = trial.output()
    trial.graft.merge()
    close(trial.output(), before, CLOSE)


def unmerge(case: Case) -> None:
    """And give them back, to the bit."""
    trial = case.trained()
    before = trial.output()
    trial.graft.merge()
    trial.graft.unmerge()
    identical(trial.output(), before)


def scale(case: Case) -> None:
    """Half of the change, none of it, its negation."""
    trial = case.trained()
    deltas = [slot.delta for slot in trial.graft.deltas.values()]
    if not any(delta.scalable for delta in deltas):
        raise NothingToDoError("new values replace the base's: there is no change to scale")
    found = []
    for factor in (1.0, 0.5, -1.0, 0.0):
        trial.graft.scale = factor
        found.append(trial.output())
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i]), "scales give the same outputs"
    if all(delta.scalable for delta in deltas):
        model, batch = case.base.build()
        identical(found[-1], outputs(model, batch), "outputs at scale 0")


def mix(case: Case) -> None:
    """With a graft of another method on the same model, both act."""
    model, batch, both = _mixed(case)
    found = []
    for active in (both, both[:1], both[1:], []):
        with only(both, active):
            found.append(outputs(model, batch))
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i]), "a graft of the mix does not act"


def save_mix(case: Case) -> None:
    """Two grafts of different methods, and one graft of several kinds, come back from their files."""
    model, batch, both = _mixed(case)
    base, _ = case.base.build()
    mixed = case.recipe.model_copy(update={"name": "mixed", "parts": (*case.recipe.parts, *_embedding_part(case))})
    single, single_base = case.base.build()[0], case.base.build()[0]
    graft = attach(single, batch, mixed)
    case.disturb(graft)
    with tempfile.TemporaryDirectory() as folder:
        for number, one in enumerate(both):
            load(one.save(Path(folder) / str(number)), base)
        load(graft.save(Path(folder) / "mixed"), single_base)
    close(outputs(base, batch), outputs(model, batch), CLOSE, "outputs of two loaded grafts")
    close(outputs(single_base, batch), outputs(single, batch), CLOSE, "outputs of a loaded graft of several kinds")


def several(case: Case) -> None:
    """Two grafts of this method act at once, each at its own scale."""
    if any(delta.hides for delta in case.kinds):
        raise NothingToDoError("the upper of two gives a weight of its own: there is nothing left of the lower one")
    model, batch, pair = _several(case)
    alone = []
    for graft in pair:
        with only(pair, [graft]):
            alone.append(outputs(model, batch))
    together = outputs(model, batch)
    assert torch.isfinite(together).all()
    assert grafts(model) == pair
    if any(slot.delta.scalable for slot in pair[0].deltas.values()):
        assert not any(torch.equal(together, one) for one in alone), "one of two grafts does not act"


def route_samples(case: Case) -> None:
    """Every sample of a batch goes through its own graft."""
    model, batch, pair = _several(case)
    wanted = [pair[0], None, pair[1]]
    alone = []
    for number, graft in enumerate(wanted):
        with only(pair, [] if graft is None else [graft]):
            alone.append(outputs(model, {n: v[number : number + 1] for n, v in batch.items()}))
    with route(model, wanted):
        close(outputs(model, batch), torch.cat(alone), CLOSE)


def switch(case: Case) -> None:
    """One graft out of force and another in, without attaching again."""
    model, batch, pair = _several(case)
    base, _ = case.base.build()
    found: list[Tensor] = []
    for active in ([pair[0]], [pair[1]], [pair[0]], []):
        with only(pair, active):
            found.append(outputs(model, batch))
    identical(found[0], found[2], "outputs after switching there and back")
    assert not torch.equal(found[0], found[1]), "both grafts give the same outputs"
    identical(found[3], outputs(base, batch), "outputs with both out of force")


PROBES: dict[str, Callable[[Case], None]] = {
    "train": train,
    "save": save,
    "merge": merge,
    "unmerge": unmerge,
    "scale": scale,
    "mix": mix,
    "save the mix": save_mix,
    "several": several,
    "per sample": route_samples,
    "switch": switch,
}


def _mixed(case: Case) -> tuple[nn.Module, dict[str, Any], list[Graft]]:
    """A model with the graft on top of one of another method, or beneath it where it needs the bare weight."""
    model, batch = case.base.build()
    lowest = any(delta.reads_weight or delta.hides for delta in case.kinds)
    recipes = [case.recipe, COMPANION] if lowest else [COMPANION, case.recipe]
    both = [attach(model, batch, recipe) for recipe in recipes]
    for number, graft in enumerate(both):
        case.disturb(graft, seed=number)
    return model, batch, both


def _several(case: Case) -> tuple[nn.Module, dict[str, Any], list[Graft]]:
    model, batch = case.base.build()
    pair = [attach(model, batch, case.recipe, seed) for seed in (0, 1)]
    for number, graft in enumerate(pair):
        case.disturb(graft, seed=number)
    return model, batch, pair


def _embedding_part(case: Case) -> tuple[Any, ...]:
    """A part of another kind, for sites that most recipes leave alone."""
    where = {"type": ["embedding?", "conv?"]}
    return Recipe.parse({"parts": [{"where": where, "what": {"kind": "low-rank", "rank": 1}}]}).parts
