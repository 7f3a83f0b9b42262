"""The table of capabilities: every verb is tried on every method, and holes have reasons."""

from __future__ import annotations

import pytest

from finegraft.registry import methods
from finegraft.testing import capabilities, capabilities_table
from finegraft.testing.capability_table import YES, holes
from finegraft.testing.probes import PROBES

REASONS = {"no weight can express", "new values replace the base's", "the upper of two gives a weight of its own"}


@pytest.mark.parametrize("method", list(methods))
def test_no_hole_without_a_reason(method):
    found = capabilities([method])
    assert holes(found) == []
    assert list(found[method]) == list(PROBES)
    for outcome in found[method].values():
        assert outcome == YES or any(outcome.startswith(reason) for reason in REASONS)


def test_what_each_family_can_do():
    found = capabilities(["lora", "s2ft", "pfeiffer", "head"])
    assert set(found["lora"].values()) == {YES} == set(found["s2ft"].values())
    assert {verb for verb, outcome in found["pfeiffer"].items() if outcome != YES} == {"merge", "unmerge"}
    assert {verb for verb, outcome in found["head"].items() if outcome != YES} == {"scale"}


def test_table_shows_ticks_and_reasons():
    reason = "no weight can express 'bottleneck', which changes activations"
    table = capabilities_table({"pfeiffer": {verb: reason if verb == "merge" else YES for verb in PROBES}})
    assert [column.header for column in table.columns] == ["method", *PROBES]
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[0] == "pfeiffer"
    assert cells.count("✓") == len(PROBES) - 1
    assert reason in str(table.caption)


def test_a_fault_is_a_hole():
    assert holes({"m": {"train": YES, "merge": "fails: TypeError: x"}}) == ["m merge: fails: TypeError: x"]
