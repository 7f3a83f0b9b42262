"""Whether two trainings changed the same entries: their overlap, against what chance would give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finegraft.analysis.changes import (
    changed,
    comparable,
    compared_pairs,
    copies_of_tables,
    in_one_precision,
    slices_of,
)
from finegraft.analysis.checkpoint import Checkpoint, pair
from finegraft.analysis.difference import Progress
from finegraft.analysis.places import places
from finegraft.errors import RecipeError, StoreError

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Overlap:
    """The entries that two subnetworks share.

    Attributes:
        entries: numbers in all.
        first: how many of them the first changed.
        second: how many the second changed.
        both: how many both changed.
        expected: how many both would have changed if each had drawn as many as it did, at random within each tensor.
    """

    entries: int
    first: int
    second: int
    both: int
    expected: float

    @property
    def ratio(self) -> float | None:
        """Shared entries over those expected by chance; None where none are expected."""
        return self.both / self.expected if self.expected else None

    @property
    def jaccard(self) -> float | None:
        """Shared entries over those that either changed; None where none did."""
        either = self.first + self.second - self.both
        return self.both / either if either else None

    @property
    def of_first(self) -> float | None:
        """Share of the first subnetwork that lies in the second; None if the first is empty."""
        return self.both / self.first if self.first else None

    @property
    def of_second(self) -> float | None:
        """Share of the second subnetwork that lies in the first; None if the second is empty."""
        return self.both / self.second if self.second else None


@dataclass(frozen=True)
class TensorOverlap:
    """The overlap in one tensor of the base, with its role and layer."""

    name: str
    role: str
    layer: int | None
    overlap: Overlap


@dataclass(frozen=True)
class SubnetworkOverlap:
    """The overlap of what two trainings of one base changed.

    Attributes:
        base: what the base was opened as.
        names: what the two were opened as.
        tolerance: an entry counts as changed when it differs by more.
        tensors: tensor by tensor, in the order of the base.
        left_out: tensors of the base that could not be compared in both.
    """

    base: str
    names: tuple[str, str]
    tolerance: float
    tensors: tuple[TensorOverlap, ...]
    left_out: tuple[str, ...]

    @property
    def total(self) -> Overlap:
        """The overlap in all tensors together; chance is counted within each."""
        return joined([tensor.overlap for tensor in self.tensors])


def joined(overlaps: Sequence[Overlap]) -> Overlap:
    """The overlap in several tensors together."""
    return Overlap(
        entries=sum(overlap.entries for overlap in overlaps),
        first=sum(overlap.first for overlap in overlaps),
        second=sum(overlap.second for overlap in overlaps),
        both=sum(overlap.both for overlap in overlaps),
        expected=sum(overlap.expected for overlap in overlaps),
    )


def overlap(
    base: Checkpoint,
    first: Checkpoint,
    second: Checkpoint,
    *,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> SubnetworkOverlap:
    """Compares which entries two trainings of one base changed; one tensor of each is in memory at a time.

    Args:
        base: what both started from.
        first: one trained state.
        second: another.
        tolerance: an entry counts as changed when it differs from the base by more; default 1e-5.
        progress: is told the name of each tensor and its number of entries when it is done.

    Raises:
        StoreError: tensors that cannot be read, or checkpoints that share none.
        RecipeError: a tolerance that is negative or no number.
    """
    if not 0 <= tolerance < math.inf:
        raise RecipeError(f"a tolerance is a finite number from 0 up, not {tolerance!r}")
    to_first, to_second = pair(base, first), pair(base, second)
    in_first, in_second = (dict(compared_pairs(base, c, p)) for c, p in ((first, to_first), (second, to_second)))
    where = places({name: facts.shape for name, facts in base.tensors.items()})
    repeated = copies_of_tables(base, where)
    shared = [name for name in base.tensors if name in in_first and name in in_second and name not in repeated]
    if not shared:
        raise StoreError(f"no tensor of {base.name} can be compared in both {first.name} and {second.name}")
    found = []
    for name in shared:
        counted = _count(base, (first, in_first[name]), (second, in_second[name]), name, tolerance)
        found.append(TensorOverlap(name, where[name].role, where[name].layer, counted))
        if progress is not None:
            progress(name, counted.entries)
    left_out = [
        name for name, facts in base.tensors.items() if name not in {*shared, *repeated} and comparable(facts, facts)
    ]
    return SubnetworkOverlap(base.name, (first.name, second.name), tolerance, tuple(found), tuple(left_out))


def _count(
    base: Checkpoint, first: tuple[Checkpoint, str], second: tuple[Checkpoint, str], name: str, tolerance: float
) -> Overlap:
    before = base.read(name)
    base_one, one = in_one_precision(before, first[0].read(first[1]))
    base_two, two = in_one_precision(before, second[0].read(second[1]))
    counts = [0, 0, 0]
    for start_one, after_one, start_two, after_two in slices_of(base_one, one, base_two, two):
        in_one, in_two = changed(start_one, after_one, tolerance), changed(start_two, after_two, tolerance)
        for place, mask in enumerate((in_one, in_two, in_one & in_two)):
            counts[place] += int(mask.sum())
    entries = before.numel()
    return Overlap(entries, counts[0], counts[1], counts[2], counts[0] * counts[1] / entries)
