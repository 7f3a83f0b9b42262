"""What a graft computes: the fast path against the weights that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finegraft.testing.bases import leading
from finegraft.testing.case import GENTLE, Case, Trial, all_close, close, distance, identical, outputs, probe
from finegraft.testing.laws.law import law, law_where, mergeable, merges
from finegraft.testing.plain import plainly

SINGLE, DOUBLE, HALF = 1e-5, 1e-12, 4e-2
"""Largest difference allowed, relative to the largest number: float32, float64 and bfloat16 (ten of its roundings)."""

SCALES = (1.0, 0.5, -1.0)
STEP = 1e-6
DERIVATIVE = 1e-5


@law_where(lambda case: all(delta.starts_as_identity for delta in case.kinds))
def a_fresh_graft_is_the_identity(case: Case) -> None:
    """Before the first step a graft changes no output, up to rounding where its start is a part of the weight."""
    model, batch = case.base.build()
    before = outputs(model, batch)
    trial = case.start()
    if any(delta.rounds_at_start for delta in case.kinds):
        close(trial.output(), before, SINGLE)
    else:
        identical(trial.output(), before)


@law
def a_trained_graft_changes_outputs(case: Case) -> None:
    """Other values of the trained tensors give other outputs."""
    trial = case.start()
    before = trial.output()
    trial_after = case.trained()
    assert not torch.equal(trial_after.output(), before), "training changed no output"


def _agree(case: Case, dtype: torch.dtype, bound: float, share: float = 1.0) -> None:
    trial = case.trained(dtype, share=share)
    exact = {n: v.double() if _fractions(v) else v for n, v in trial.batch.items()}
    for scale in SCALES:
        trial.graft.scale = scale
        truth = plainly(case.base.build(dtype)[0].double(), [(trial.graft, scale)])
        close(trial.output(), outputs(truth, exact), bound, f"outputs at scale {scale}")


def _fractions(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@law_where(mergeable)
def forward_agrees_with_weight_in_single_precision(case: Case) -> None:
    """Outputs are those of the base under the weights that the graft says it stands for, at any scale: to 1e-5."""
    _agree(case, torch.float32, SINGLE)


@law_where(mergeable)
def forward_agrees_with_weight_in_double_precision(case: Case) -> None:
    """The same in float64: to 1e-12, so nothing on the way is computed in less."""
    _agree(case, torch.float64, DOUBLE)


@law_where(mergeable)
def forward_agrees_with_weight_in_bfloat16(case: Case) -> None:
    """The same on a bfloat16 base, against exact arithmetic: to ten roundings, or three times what the base loses."""
    model, batch = case.base.build(torch.bfloat16)
    rounded = outputs(model, batch)
    lost = distance(rounded, outputs(model.double(), {n: v.double() if _fractions(v) else v for n, v in batch.items()}))
    _agree(case, torch.bfloat16, max(HALF, 3 * lost), GENTLE)


@law_where(mergeable)
def gradients_agree_with_those_through_the_weight(case: Case) -> None:
    """Gradients of trained tensors and of inputs are those that autograd finds through the weights, at any scale."""
    trial = case.trained()
    model, _ = case.base.build()
    model.requires_grad_(False)
    for scale in SCALES:
        trial.graft.scale = scale
        all_close(trial.gradients(), trial.gradients(plainly(model, [(trial.graft, scale)])), SINGLE)


@law
def gradients_are_derivatives(case: Case) -> None:
    """Gradients are the derivative of the output, where those through the weights are (some kinds pass straight)."""
    _check_derivative(case, training=False)


@law
def gradients_in_training_are_derivatives(case: Case) -> None:
    """The same in training mode, when dropout acts: with the same random numbers forward and backward agree."""
    _check_derivative(case, training=True)


def _check_derivative(case: Case, *, training: bool) -> None:
    trial = case.trained(torch.float64)
    if case.mergeable and not _is_derivative(trial, plainly(case.base.build(torch.float64)[0], [(trial.graft, 1.0)])):
        return
    if any(slot.delta.passes_straight for slot in trial.graft.all_slots):
        return
    trial.model.train(training)
    slope, change = _slopes(trial, trial.model)
    assert abs(slope - change) <= DERIVATIVE * max(abs(change), 1e-3), f"gradient {slope:.9g}, derivative {change:.9g}"


def _is_derivative(trial: Trial, run: Callable[..., Any]) -> bool:
    slope, change = _slopes(trial, run)
    return abs(slope - change) <= DERIVATIVE * max(abs(change), 1e-3)


def _slopes(trial: Trial, run: Callable[..., Any]) -> tuple[float, float]:
    """The slope along one direction of the trained tensors, by gradients and by differences."""
    own = dict(trial.graft.named_parameters())
    rng = torch.Generator().manual_seed(3)
    ways = {name: torch.randn(p.shape, generator=rng, dtype=torch.float64) for name, p in own.items()}

    def value() -> Tensor:
        torch.manual_seed(4)
        y = leading(run(**trial.batch))
        return (y * probe(y)).sum()

    found = torch.autograd.grad(value(), list(own.values()), allow_unused=True)
    slope = sum(float((g * ways[n]).sum()) for n, g in zip(own, found, strict=True) if g is not None)
    ends = []
    for step in (STEP, -2 * STEP):
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.add_(step * ways[name])
            ends.append(float(value()))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.add_(STEP * ways[name])
    return slope, (ends[0] - ends[1]) / (2 * STEP)


@law
def scale_zero_is_the_base(case: Case) -> None:
    """At scale 0 outputs are the base's own, at scale 1 the graft's, to the bit; replacements are never scaled."""
    trial = case.trained()
    model, batch = case.base.build()
    before, full = outputs(model, batch), trial.output()
    trial.graft.scale = 0.0
    scalable = {slot.delta.scalable for slot in trial.graft.deltas.values()}
    if len(scalable) == 1:
        identical(trial.output(), before if True in scalable else full)
    trial.graft.scale = 1.0
    identical(trial.output(), full)


@law_where(lambda case: case.mergeable and case.heads_stay and all(delta.scalable for delta in case.kinds))
def scale_is_linear_in_the_weight(case: Case) -> None:
    """Merged at scale ``c``, a weight is ``W + c (W_1 - W)``, for negative ``c`` too."""
    trial = case.trained()
    base, _ = case.base.build()
    before = dict(base.named_parameters())
    if not merges(trial):
        return
    trial.graft.unmerge()

    def merged(scale: float) -> dict[str, Tensor]:
        trial.graft.scale = scale
        trial.graft.merge()
        stored = {n: p.detach().clone() for n, p in trial.model.named_parameters() if n in before}
        trial.graft.unmerge()
        return stored

    whole = merged(1.0)
    for scale in (0.25, -0.5):
        for name, weight in merged(scale).items():
            start = before[name].detach()
            close(weight, start + scale * (whole[name] - start), SINGLE, f"{name} merged at scale {scale}")
