"""A graft in the hands of PyTorch: copied, compiled, checkpointed, cast."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from finegraft.grafting.merging import grafts
from finegraft.testing.bases import leading
from finegraft.testing.bits import snapshot, stored, unchanged
from finegraft.testing.case import GENTLE, Case, all_close, close, distance, identical, outputs
from finegraft.testing.laws.agreement import HALF, SINGLE
from finegraft.testing.laws.law import law, slow_law

AUTOCAST = 8e-2
"""Largest difference from float32 under bfloat16 autocast, relative to the largest number."""


@law
def a_copy_is_equal_and_independent(case: Case) -> None:
    """``copy.deepcopy`` gives equal outputs; training, merging or detaching the copy leaves the original alone."""
    trial = case.trained()
    trial.graft.scale = 0.8
    before, tensors = trial.output(), snapshot(trial.model)
    twin = copy.deepcopy(trial.model)
    identical(outputs(twin, trial.batch), before, "outputs of the copy")
    (graft,) = grafts(twin)
    assert graft is not trial.graft
    assert graft.model is twin
    case.disturb(graft, seed=9, share=-2.0)
    assert not torch.equal(outputs(twin, trial.batch), before), "the copy does not train"
    unchanged(snapshot(trial.model), tensors)
    identical(trial.output(), before, "outputs of the original")
    graft.detach()
    base, batch = case.base.build()
    unchanged(stored(twin), stored(base))
    identical(outputs(twin, trial.batch), outputs(base, batch), "outputs of the detached copy")
    unchanged(snapshot(trial.model), tensors)
    identical(trial.output(), before, "outputs of the original after detaching the copy")


@slow_law
def compiling_changes_nothing(case: Case) -> None:
    """``torch.compile(fullgraph=True)`` takes a graft in one graph: same outputs and gradients, after a step too."""
    trial = case.trained()
    torch.compiler.reset()
    compiled = torch.compile(trial.model, fullgraph=True, backend="eager")
    results: list[Any] = []

    def run(**batch: Any) -> Any:
        results.append(compiled(**batch))
        return results[-1]

    for seed in (1, 2):
        found = trial.gradients(run)  # before the model itself runs, which would bring stored values up to date
        all_close(found, trial.gradients(), SINGLE)
        close(leading(results[-1]), trial.output(), SINGLE)
        case.disturb(trial.graft, seed)


@law
def checkpointing_changes_no_gradient(case: Case) -> None:
    """Activation checkpointing gives the same gradients, dropout included."""
    trial = case.trained()
    trial.model.train()

    def run(**batch: object) -> object:
        return checkpoint(lambda: trial.model(**batch), use_reentrant=False)

    torch.manual_seed(6)
    expected = trial.gradients()
    torch.manual_seed(6)
    all_close(trial.gradients(run), expected, SINGLE)


@law
def autocast_stays_close(case: Case) -> None:
    """Under bfloat16 autocast outputs stay near those in float32, and gradients come in the precision of the tensors.

    Near is a bound of 0.08, or three times what the base itself loses.
    """
    model, batch = case.base.build()
    trial = case.trained(share=GENTLE)
    exact, expected = outputs(model, batch), trial.output()
    with torch.autocast("cpu", torch.bfloat16):
        close(trial.output().float(), expected, max(AUTOCAST, 3 * distance(outputs(model, batch), exact)))
        found = trial.gradients()
    for name, parameter in trial.graft.named_parameters():
        if name in found:
            assert found[name].dtype == parameter.dtype, f"the gradient of {name} is {found[name].dtype}"
            assert torch.isfinite(found[name]).all(), f"the gradient of {name} is not finite"


@law
def casting_there_and_back_works(case: Case) -> None:
    """``model.to`` takes grafts along: in bfloat16 outputs are close, back in float32 the base is as rounded."""
    base, batch = case.base.build()
    rounded = {n: v.bfloat16() if v.is_floating_point() else v for n, v in batch.items()}
    exact = outputs(base, batch)
    bound = max(3 * HALF, 3 * distance(outputs(base.bfloat16(), rounded), exact))
    trial = case.trained(share=GENTLE)
    expected = trial.output()
    close(outputs(trial.model.bfloat16(), rounded).float(), expected, bound, "outputs in bfloat16")
    trial.model.float()
    close(trial.output(), expected, bound, "outputs back in float32")
    trial.gradients()
    trial.graft.detach()
    unchanged(stored(trial.model), stored(base.float()))
