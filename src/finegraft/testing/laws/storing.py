"""What a graft keeps: files, counts and checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from finegraft.grafting.load import load
from finegraft.grafting.merging import grafts
from finegraft.grafting.slot import Slot
from finegraft.locate.site import Site
from finegraft.testing.case import Case, Trial, close, identical
from finegraft.testing.laws.agreement import SINGLE
from finegraft.testing.laws.law import law

OVERHEAD = 1024
"""Bytes a file may need on top of its numbers, and again for each tensor's name and place."""


@law
def a_saved_graft_loads_to_the_same_outputs(case: Case) -> None:
    """Saved and loaded onto a fresh base, a graft gives the same outputs to the bit; the file holds just its numbers.

    To the bit if it is loaded to train on: PyTorch sums in another order where a factor of a product takes no gradient.
    """
    trial = case.trained()
    with tempfile.TemporaryDirectory() as folder:
        path = trial.graft.save(Path(folder) / "graft")
        loaded = _loaded(case, path, trainable=True)
        identical(loaded.output(), trial.output())
        close(_loaded(case, path).output(), trial.output(), SINGLE, "outputs of a graft that does not train")
        slots = trial.graft.deltas.values()
        tensors = [tensor for slot in slots for _, tensor in slot.tensors()]
        numbers = sum(t.numel() * t.element_size() for t in tensors)
        size = (path / "graft.safetensors").stat().st_size
        assert size <= numbers + OVERHEAD * (1 + len(tensors)), f"{size} bytes for {numbers} bytes of numbers"
        again = _loaded(case, loaded.graft.save(Path(folder) / "again"), trainable=True)
        identical(again.output(), trial.output(), "outputs after a second round trip")
    assert loaded.graft.recipe == trial.graft.recipe
    if all(slot.delta.folded() == slot.delta for slot in slots):
        assert loaded.graft.num_trainable == trial.graft.num_trainable


def _loaded(case: Case, path: Path, *, trainable: bool = False) -> Trial:
    model, batch = case.base.build()
    graft = load(path, model, trainable=trainable)
    assert all(parameter.requires_grad == trainable for parameter in graft.parameters())
    assert grafts(model) == [graft]
    return Trial(case, model, batch, graft)


@law
def declared_counts_are_actual_counts(case: Case) -> None:
    """The numbers that train are those that kinds declare, and those that an optimizer over the model would see."""
    trial = case.start()
    declared = sum(_declared(slot, p.site) for p in trial.graft.placements for slot in p.slots)
    seen = sum(parameter.numel() for parameter in trial.model.parameters() if parameter.requires_grad)
    grouped = sum(parameter.numel() for group in trial.graft.parameter_groups() for parameter in group["params"])
    assert declared == trial.graft.num_trainable == seen == grouped > 0, (
        f"declared {declared}, in the graft {trial.graft.num_trainable}, in the model {seen}, in groups {grouped}"
    )


def _declared(slot: Slot, site: Site) -> int:
    """What the kind declares, without what another site of the part counts for this one too."""
    shapes = slot.delta.shapes(site)
    return slot.delta.count(site) - sum(torch.Size(shapes[name]).numel() for name in slot.borrowed)


@law
def state_round_trips(case: Case) -> None:
    """A checkpoint's state put into a graft from another seed, or another start, gives the same trained tensors."""
    trial, other = case.trained(), case.start()
    saved = {name: tensor.clone() for name, tensor in trial.graft.state().items()}
    other.graft.load_state(saved)
    identical(other.output(), trial.output())
    for name, tensor in other.graft.state().items():
        assert torch.equal(tensor, saved[name]), f"{name} differs"
