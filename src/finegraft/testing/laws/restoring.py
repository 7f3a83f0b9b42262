"""What a graft leaves behind: nothing."""

from __future__ import annotations

import torch

from finegraft.errors import NotMergeable
from finegraft.grafting.merging import grafts, merge
from finegraft.testing.bits import snapshot, stored, unchanged
from finegraft.testing.case import Case, Trial, attach, close, gradients, identical, outputs, says
from finegraft.testing.laws.agreement import SINGLE
from finegraft.testing.laws.law import law, law_where, mergeable, merges


@law_where(mergeable)
def merging_changes_no_output(case: Case) -> None:
    """A merged graft computes what it computed before, with the base's own forward."""
    trial = case.trained()
    for scale in (1.0, -0.5):
        trial.graft.scale = scale
        before = trial.output()
        if not merges(trial):
            return
        close(trial.output(), before, SINGLE)
        trial.graft.unmerge()


@law_where(mergeable)
def unmerging_restores_every_bit(case: Case) -> None:
    """After merge and unmerge every stored number and every output is what it was, in any precision, to the bit."""
    for dtype in (torch.float32, torch.bfloat16):
        trial = case.trained(dtype)
        output = trial.output()
        before = stored(trial.model)
        if not merges(trial):
            return
        merged = stored(trial.model)
        trial.graft.merge()
        unchanged(stored(trial.model), merged)
        trial.graft.unmerge()
        unchanged(stored(trial.model), before)
        identical(trial.output(), output)


@law
def detaching_restores_every_bit(case: Case) -> None:
    """Detaching gives the base back: tensors with the sign of zeros, classes, hooks, flags, modes, names and order.

    Whatever was done meanwhile: training steps, other scales, merging, disabling.
    """
    model, batch = case.base.build()
    model.train()
    next(module for module in model.modules() if module is not model).eval()
    list(model.parameters())[-1].requires_grad_(False)
    torch.manual_seed(5)
    expected = outputs(model.eval(), batch)
    model.train()
    before = snapshot(model)
    graft = attach(model, batch, case.recipe, case.seed)
    case.disturb(graft)
    model.eval()
    gradients(model, batch, dict(graft.named_parameters()))
    graft.scale = 0.7
    outputs(model, batch)
    with graft.disabled():
        identical(outputs(model, batch), expected, "outputs with the graft disabled")
    if case.mergeable:
        merges(Trial(case, model, batch, graft))
        outputs(model, batch)
    model.train()
    graft.detach()
    unchanged(snapshot(model), before)
    assert grafts(model) == []
    identical(outputs(model.eval(), batch), expected)


@law_where(lambda case: not case.mergeable)
def what_cannot_merge_says_so_and_changes_nothing(case: Case) -> None:
    """A change that no weight can express refuses to merge, and the model stays as it was."""
    trial = case.trained()
    output = trial.output()
    before = snapshot(trial.model)
    for attempt in (trial.graft.merge, lambda: merge(trial.model)):
        try:
            attempt()
        except NotMergeable as error:
            says(error, next(repr(delta.kind) for delta in case.kinds if not delta.mergeable))
        else:
            raise AssertionError("merged, though no weight can express it")
    unchanged(snapshot(trial.model), before)
    identical(trial.output(), output)


@law_where(mergeable)
def merging_for_good_leaves_a_plain_model(case: Case) -> None:
    """After ``fg.merge`` the model has the classes and names of the base, and computes what the graft did."""
    trial = case.trained()
    base, _ = case.base.build()
    before = trial.output()
    try:
        merge(trial.model, trial.graft)
    except NotMergeable as error:
        says(error, "cannot hold the bias")
        return
    close(trial.output(), before, SINGLE)
    assert [type(m) for m in trial.model.modules()] == [type(m) for m in base.modules()], "classes differ"
    added = set(trial.model.state_dict()) ^ set(base.state_dict())
    assert all(name.endswith("bias") for name in added), f"other names: {sorted(added)}"
    assert grafts(trial.model) == [], "grafts are left"
