"""Reading, adding to and writing chosen units, against the plain loop over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finegraft.select.units import EVERYTHING, Units

LAYOUTS = {
    "contiguous": lambda m: m.clone(),
    "transposed": lambda m: m.transpose(-1, -2).contiguous().transpose(-1, -2),
    "strided": lambda m: torch.stack([m, m], dim=-1)[..., 0],
    "channels last": lambda m: m.permute(*range(1, m.ndim), 0).contiguous().permute(-1, *range(m.ndim - 1)),
}


@st.composite
def chosen(draw):
    shape = draw(st.sampled_from([(4, 5), (1, 1), (3, 1), (2, 3, 4)]))
    unit = draw(st.sampled_from(["entry", "row", "column"]))
    rows = shape[-2] * (shape[0] if len(shape) == 3 else 1)
    count = {"entry": rows * shape[-1], "row": rows, "column": shape[-1]}[unit]
    index = draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(sorted))
    return shape, unit, torch.tensor(index)


def places(shape, unit, index):
    """Flat positions of the chosen units, in the order of their values."""
    flat = torch.arange(torch.Size(shape).numel()).view(shape)
    if unit == "entry":
        return flat.reshape(-1)[index]
    if unit == "row":
        return flat.reshape(-1, shape[-1])[index]
    return torch.stack([flat[..., i] for i in index.tolist()], dim=-1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(chosen(), st.sampled_from(list(LAYOUTS)))
def test_units_agree_with_a_dense_reference(case, layout):
    shape, unit, index = case
    rng = torch.Generator().manual_seed(0)
    plain = torch.randn(shape, generator=rng)
    matrix = LAYOUTS[layout](plain)
    units, at = Units(unit, index), places(shape, unit, index)
    values = torch.randn(units.shape(shape), generator=rng)
    assert at.shape == values.shape

    assert torch.equal(units.gather(matrix), plain.reshape(-1)[at])

    added = plain.clone().reshape(-1)
    added[at.reshape(-1)] += values.reshape(-1)
    assert torch.equal(units.add(matrix, values), added.view(shape))
    assert torch.equal(matrix, plain), "adding must not write"

    written = plain.clone().reshape(-1)
    written[at.reshape(-1)] = values.reshape(-1)
    units.write_(matrix, values)
    assert torch.equal(matrix, written.view(shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything(layout):
    matrix = LAYOUTS[layout](torch.arange(12.0).view(3, 4))
    values = torch.ones(3, 4)
    assert EVERYTHING.shape((3, 4)) == (3, 4)
    copy = EVERYTHING.gather(matrix)
    assert torch.equal(EVERYTHING.add(matrix, values), matrix + 1)
    EVERYTHING.write_(matrix, values)
    assert torch.equal(matrix, values)
    assert torch.equal(copy, torch.arange(12.0).view(3, 4)), "what was gathered is a copy"


def test_adding_keeps_the_precision_of_the_matrix_and_the_gradient_of_the_values():
    values = torch.ones(2, 3, requires_grad=True)
    added = Units("row", torch.tensor([0, 2])).add(torch.zeros(4, 3, dtype=torch.bfloat16), values)
    assert added.dtype == torch.bfloat16
    added.float().sum().backward()
    assert torch.equal(values.grad, torch.ones(2, 3))
