"""Training a graft."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finegraft.grafting.graft import Graft
from finegraft.select.units import Units
from finegraft.testing.bases import leading
from finegraft.testing.bits import stored
from finegraft.testing.case import Case, Trial, all_close, identical, probe
from finegraft.testing.laws.agreement import SINGLE
from finegraft.testing.laws.law import law, law_where
from finegraft.testing.loop import Loop

STEPS = 12
RATES = (3e-3, 3e-4)
_STOPS = (1, 7)
_PASSES = 8
"""Tried for a gradient that is not zero, since a change may leave itself out of some."""


@law
def gradients_reach_trained_tensors_and_nothing_else(case: Case) -> None:
    """After backward every trained tensor has a gradient that is not zero, and no other tensor of the model has one.

    But for those that only penalties train.
    """
    trial = case.trained()
    trial.model.train()
    for _ in range(_PASSES):
        y = leading(trial.model(**trial.batch))
        if y.requires_grad:
            (y * probe(y)).sum().backward()
        if any(p.grad is not None and p.grad.any() for p in trial.graft.parameters()):
            break
    own = {id(p) for p in trial.graft.parameters()}
    auxiliary = {f"{slot.key}/{name}" for slot in trial.graft.all_slots for name in slot.delta.auxiliary}
    for name, parameter in trial.graft.named_parameters():
        if name in auxiliary:
            continue
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
    assert any(p.grad is not None and p.grad.any() for p in trial.graft.parameters()), "all gradients are zero"
    for name, parameter in trial.model.named_parameters():
        assert id(parameter) in own or (parameter.grad is None and not parameter.requires_grad), f"{name} trains"


@law
def training_lowers_the_loss(case: Case) -> None:
    """A few steps of AdamW towards what other values of the trained tensors give lower the distance to it."""
    target = case.trained().output()
    for rate in RATES:
        trial = case.start()
        if any(delta.saturated_at_start for delta in case.kinds):
            case.disturb(trial.graft, seed=5, share=1.2)
        losses = _train(trial, target, rate=rate)
        if min(losses[1:]) < losses[0]:
            return
    raise AssertionError(f"losses {losses}")


def _train(trial: Trial, target: Tensor, *, rate: float, weight_decay: float = 0.0) -> list[float]:
    size = float((trial.output() - target).abs().max()) or 1.0  # gradients far below AdamW's epsilon would not count

    def loss(batch: Any) -> Tensor:
        return ((leading(trial.model(**batch)) - target) / size).square().mean()

    return Loop(trial, loss, steps=STEPS, rate=rate, weight_decay=weight_decay).run()


@law
def resumed_training_gives_the_same_bits(case: Case) -> None:
    """Stopped after any step and taken up on a fresh base, a training ends as one that was never stopped."""
    target = case.trained().output()

    def loop() -> Loop:
        trial = case.start()
        return Loop(trial, lambda batch: (leading(trial.model(**batch)) - target).square().mean(), steps=STEPS)

    whole = loop()
    states = {}
    for step in _STOPS:
        whole.run(step)
        states[step] = whole.state()
    whole.run()
    expected, output = whole.trial.graft.state(), whole.trial.output()
    for step, state in states.items():
        parts = loop()
        parts.load_state(state)
        parts.run()
        found = parts.trial.graft.state()
        assert found.keys() == expected.keys(), f"other tensors than expected: {sorted(found.keys() ^ expected.keys())}"
        for name, tensor in expected.items():
            identical(found[name], tensor, f"{name}, resumed after step {step}")
        identical(parts.trial.output(), output, f"outputs, resumed after step {step}")


@law
def new_values_are_seen_however_they_are_set(case: Case) -> None:
    """Forward runs on the trained tensors as they are, whether set in place, through ``.data`` or by new data."""
    trial, expected, seen = case.start(), case.start(), False
    for change, shift in ((_in_place, -0.6), (_through_data, 1.2), (_by_new_data, -2.4)):
        before = trial.output()
        with torch.no_grad():
            change(trial.graft, shift)
        now = trial.output()
        seen |= not torch.equal(now, before)  # so large a shift can also leave an output where it was, saturated
        with expected.graft.disabled():
            expected.graft.load_state(trial.graft.state())
        identical(now, expected.output(), f"outputs after a change {change.__name__.strip('_')}")
    assert seen, "no change of values changed an output"


def _in_place(graft: Graft, shift: float) -> None:
    for parameter, noise in _noises(graft, shift):
        parameter.add_(noise)


def _through_data(graft: Graft, shift: float) -> None:
    for parameter, noise in _noises(graft, shift):
        parameter.data.add_(noise)


def _by_new_data(graft: Graft, shift: float) -> None:
    for parameter, noise in _noises(graft, shift):
        parameter.data = parameter.data + noise


def _noises(graft: Graft, shift: float) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """Noise about a shift that is large against the start, so that thresholds are crossed."""
    rng = torch.Generator().manual_seed(1)
    return [(p, 0.3 * torch.randn(p.shape, generator=rng).to(p) + shift) for p in graft.parameters()]


@law
def gradients_accumulate(case: Case) -> None:
    """Gradients of two parts of a batch, one after the other, add up to those of the batch."""
    trial = case.trained(torch.float64)  # a gradient in which tokens cancel is no fault
    weights = probe(trial.output())
    samples = len(weights)

    def accumulate(parts: list[slice]) -> dict[str, Tensor]:
        trial.model.zero_grad(set_to_none=True)
        for part in parts:
            y = leading(trial.model(**{n: v[part] if isinstance(v, Tensor) else v for n, v in trial.batch.items()}))
            (y * weights[part]).sum().backward()
        return {name: p.grad.clone() for name, p in trial.graft.named_parameters() if p.grad is not None}

    all_close(accumulate([slice(0, 1), slice(1, samples)]), accumulate([slice(0, samples)]), SINGLE)


@law_where(lambda case: any(delta.needs_selection for delta in case.kinds))
def exactly_the_chosen_entries_differ(case: Case) -> None:
    """A kind that trains a selection changes these entries of the stored weights, all of them, and no other number."""
    trial = case.start()
    before = stored(case.base.build()[0])
    _train(trial, probe(trial.output()), rate=0.1, weight_decay=0.1)
    _assert_within(trial, before, every=False)
    with torch.no_grad():
        _in_place(trial.graft, 0.5)
    trial.output()
    _assert_within(trial, before, every=True)


def _assert_within(trial: Trial, before: dict[str, Tensor], *, every: bool) -> None:
    """Stored numbers differ nowhere but at chosen entries; at ``every`` one that trains still, if so asked."""
    base = trial.case.base.build()[0]
    parameters, now = dict(base.named_parameters()), dict(trial.model.named_parameters())
    none = {id(now[n]): torch.zeros_like(p, dtype=torch.bool) for n, p in parameters.items()}
    allowed, training = none, {key: mask.clone() for key, mask in none.items()}
    for placement in trial.graft.placements:
        site = placement.site
        stored = id(site.module._parameters[site.tensor])
        for slot in placement.slots if any(s.delta.needs_selection for s in placement.slots) else ():
            for change in slot.delta.changes(slot):
                if change.tensor == "weight":
                    chosen = site.op.restore(_chosen(change.units, tuple(site.weight.shape)), site.shape)
                    allowed[stored] |= chosen
                    if change.values.requires_grad:
                        training[stored] |= chosen
    for name, tensor in parameters.items():
        differs, may, must = tensor != now[name], allowed[id(now[name])], training[id(now[name])]
        assert not (differs & ~may).any(), f"{name}: {int((differs & ~may).sum())} numbers changed that were not chosen"
        assert not every or not (must & ~differs).any(), (
            f"{name}: {int((must & ~differs).sum())} chosen numbers did not change"
        )


def _chosen(units: Units, shape: tuple[int, ...]) -> Tensor:
    """Marks of chosen units, found one by one."""
    marks = torch.zeros(shape, dtype=torch.bool)
    rows, edge = marks.view(-1, shape[-1]), units.block
    across = -(-shape[-1] // edge)
    down = -(-shape[-2] // edge)
    for i in units.index.tolist():
        if units.unit == "entry":
            rows[i // shape[-1], i % shape[-1]] = True
        elif units.unit == "row":
            rows[i] = True
        elif units.unit == "block":
            matrix, tile = i // (down * across), i % (down * across)
            top, left = tile // across * edge, tile % across * edge
            marks.view(-1, *shape[-2:])[matrix, top : top + edge, left : left + edge] = True
        else:
            rows[:, i] = True
    return marks


@law_where(lambda case: case.heads_stay and all(delta.in_place for delta in case.kinds))
def weight_decay_pulls_towards_the_base(case: Case) -> None:
    """For kinds that train inside the base's tensors, decay shrinks the change and not the weight."""
    trial = case.trained()
    base, _ = case.base.build()
    before = {n: p.detach() for n, p in base.named_parameters()}

    def gap() -> float:
        trial.output()
        now = dict(trial.model.named_parameters())
        return sum(float((now[n].detach() - p).square().sum()) for n, p in before.items())

    start = gap()
    optimizer = torch.optim.SGD(trial.graft.parameters(), lr=0.5, weight_decay=1.0)
    for parameter in trial.graft.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert abs(gap() - start / 4) <= 1e-4 * start, (
        f"squared distance to the base {start:.6g} became {gap():.6g}, not a quarter"
    )
