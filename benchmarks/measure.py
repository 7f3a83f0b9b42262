"""Measuring contenders side by side: step times in turns, and bytes kept for backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from contenders import FULL, PEFT_LORA, Contender, Training, starter, twin_of
from finegraft.testing.memory import floor_bytes, held_bytes, saved_bytes
from shapes import Shape

Clock = Callable[[], float]

WARM_UP = 2


@dataclass
class Step:
    """One row of the step table.

    Attributes:
        contender: its name.
        trained: how many numbers train.
        milliseconds: median time of a step.
        ratio: median over rounds of its time by that of the reference, PEFT LoRA by default, in the same round.
        ratios: all of them, ascending.
        of_full: the same by that of full fine-tuning; 0 where that was not measured.
        optimizer: bytes of the optimizer's state.
        attach: seconds to attach it.
        memory: peak bytes over the weights, 0 where not measured.
    """

    contender: str
    trained: int
    milliseconds: float
    ratio: float
    ratios: list[float]
    of_full: float
    optimizer: int
    attach: float
    memory: int = 0


@dataclass(frozen=True)
class Kept:
    """One row of the table of bytes kept: in bytes, and relative to the floor."""

    contender: str
    saved: int
    held: int
    ratio: float
    held_ratio: float


def take_turns(
    contenders: Sequence[Contender], shape: Shape, *, rounds: int, clock: Clock, reference: Contender = PEFT_LORA
) -> list[Step]:
    """Time whole steps, interleaved; a twin of the reference shows what the run can resolve.

    Raises:
        ValueError: contenders that should train equally many numbers do not.
    """
    start = starter(shape, clock)
    trainings = {c.name: start(c) for c in contenders}
    _insist_on_equal_terms(contenders, trainings)
    twin = twin_of(reference)
    trainings[twin.name] = start(twin)
    names = list(trainings)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM_UP + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = _timed(trainings[name], clock)
            if turn >= WARM_UP:
                times[name].append(seconds)
    return [_row(name, trainings[name], times, reference.name) for name in names]


def _timed(training: Training, clock: Clock) -> float:
    began = clock()
    training.step()
    return clock() - began


def _row(name: str, training: Training, times: dict[str, list[float]], reference: str) -> Step:
    ratios = sorted(_ratios(times, name, reference))
    of_full = median(_ratios(times, name, FULL.name)) if FULL.name in times else 0.0
    milliseconds = 1000 * median(times[name])
    state, attach = training.optimizer_bytes, training.attach_seconds
    return Step(name, training.trained, milliseconds, median(ratios), ratios, of_full, state, attach)


def _ratios(times: dict[str, list[float]], name: str, other: str) -> list[float]:
    return [mine / theirs for mine, theirs in zip(times[name], times[other], strict=True)]


def _insist_on_equal_terms(contenders: Sequence[Contender], trainings: dict[str, Training]) -> None:
    for contender in contenders:
        other = trainings.get(contender.same_as or "")
        if other is not None and other.trained != trainings[contender.name].trained:
            raise ValueError(
                f"{contender.name} trains {trainings[contender.name].trained:,} numbers, {contender.same_as} "
                f"{other.trained:,}: they do not adapt the same layers, so their times do not compare"
            )


def kept_for_backward(contenders: Sequence[Contender], shape: Shape) -> list[Kept]:
    """Bytes that the forward pass of each contender keeps, relative to the floor of the untouched base."""
    base, batch = shape.build().train(), shape.batch()
    floor = floor_bytes(base, lambda: base(**batch).loss).total
    start = starter(shape)
    rows = [Kept("the floor", floor, floor, 1.0, 1.0)]
    for contender in contenders:
        training = start(contender)
        training.step()
        saved = saved_bytes(training.model, training.loss).total
        held = held_bytes(training.model, training.loss).total
        rows.append(Kept(contender.name, saved, held, saved / floor, held / floor))
    return rows
