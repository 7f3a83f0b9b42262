"""The overlap of subnetworks, against chance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from finegraft.analysis.checkpoint import HeldCheckpoint, open_checkpoint
from finegraft.analysis.subnetworks import overlap
from finegraft.analysis.summary import overlap_data, overlap_statement, overlap_table
from finegraft.errors import RecipeError
from tests.analysis.conftest import STORIES


def states(*masks: list[torch.Tensor]) -> list[HeldCheckpoint]:
    """A base of zeros, and for each list of masks a state that differs there."""
    base = {f"layers.{n}.mlp.up_proj.weight": torch.zeros_like(m, dtype=torch.float) for n, m in enumerate(masks[0])}
    tuned = [{name: mask.float() for name, mask in zip(base, each, strict=True)} for each in masks]
    return [HeldCheckpoint("base", base), *(HeldCheckpoint("tuned", each) for each in tuned)]


def drawn(share: float, seed: int, shape: tuple[int, int] = (200, 300)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def test_random_masks_overlap_by_chance_and_a_mask_with_itself_wholly() -> None:
    one, two = [drawn(0.1, 0), drawn(0.3, 1)], [drawn(0.2, 2), drawn(0.05, 3)]
    base, first, second = states(one, two)
    total = overlap(base, first, second).total
    assert total.ratio == pytest.approx(1, abs=0.05)
    assert (total.first, total.second) == (sum(int(m.sum()) for m in one), sum(int(m.sum()) for m in two))
    assert total.both == sum(int((a & b).sum()) for a, b in zip(one, two, strict=True))
    same = overlap(base, first, first).total
    assert (same.both, same.jaccard, same.of_first) == (same.first, 1, 1)


def test_chance_is_counted_within_each_tensor() -> None:
    base, first, second = states([drawn(1.0, 0), drawn(0.0, 0)], [drawn(1.0, 0), drawn(0.1, 1)])
    total = overlap(base, first, second).total
    assert total.expected == pytest.approx(total.both)


def test_disjoint_masks_share_nothing() -> None:
    mask = drawn(0.4, 0)
    total = overlap(*states([mask], [~mask])).total
    assert (total.both, total.ratio, total.jaccard) == (0, 0, 0)


def test_an_empty_subnetwork_has_no_ratio() -> None:
    found = overlap(*states([drawn(0.0, 0)], [drawn(0.4, 0)]))
    assert (found.total.ratio, found.total.of_first) == (None, None)
    assert "changes nothing" in overlap_statement(found)


def test_it_is_told_by_tensor_role_and_layer(tuned_stories: Path) -> None:
    base, tuned = open_checkpoint(STORIES), open_checkpoint(tuned_stories)
    found = overlap(base, tuned, tuned, tolerance=2e-4)
    assert overlap_table(found, "layer").row_count == 7
    data = json.loads(json.dumps(overlap_data(found), allow_nan=False))
    assert data["total"]["both"] == sum(tensor["both"] for tensor in data["tensors"]) == found.total.first
    assert "they share" in overlap_statement(found)


@pytest.mark.parametrize("tolerance", [-1, math.inf, math.nan])
def test_a_tolerance_that_is_none_is_refused(tolerance: float) -> None:
    with pytest.raises(RecipeError, match="from 0 up"):
        overlap(*states([drawn(0.1, 0)], [drawn(0.1, 1)]), tolerance=tolerance)
