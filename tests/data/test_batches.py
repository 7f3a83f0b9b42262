"""The order of rows in batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finegraft.data.batches import LengthBucketedSampler
from finegraft.errors import DataError

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=300)
sizes = st.integers(1, 17)


@settings(deadline=None)
@given(lengths, sizes, st.booleans(), st.integers(0, 5), st.integers(0, 5), st.integers(1, 8))
def test_every_row_comes_exactly_once_in_an_epoch(lengths, size, shuffle, seed, epoch, pool):
    sampler = LengthBucketedSampler(lengths, size, shuffle=shuffle, seed=seed, pool=pool)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)


@settings(deadline=None)
@given(lengths, sizes, st.integers(0, 100), st.integers(0, 100))
def test_seed_and_epoch_decide_the_order(lengths, size, seed, epoch):
    first, second = (LengthBucketedSampler(lengths, size, seed=seed) for _ in range(2))
    list(first)  # an epoch before must not matter
    first.set_epoch(epoch)
    second.set_epoch(epoch)
    assert list(first) == list(second)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=40, max_size=300), sizes, st.integers(0, 100))
def test_another_epoch_or_seed_gives_another_order(lengths, size, seed):
    sampler = LengthBucketedSampler(lengths, size, seed=seed)
    before = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != before
    assert list(LengthBucketedSampler(lengths, size, seed=seed + 1)) != before


@settings(deadline=None)
@given(lengths, sizes)
def test_evaluation_goes_from_long_to_short(lengths, size):
    order = list(LengthBucketedSampler(lengths, size, shuffle=False))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)


def test_batches_hold_rows_of_similar_length_in_no_order():
    lengths = np.random.default_rng(0).integers(1, 100, 6400)
    order = list(LengthBucketedSampler(lengths, 32))
    batches = lengths[order].reshape(-1, 32)
    padded = batches.max(1).sum() * 32
    assert lengths.sum() / padded > 0.95
    assert abs(np.corrcoef(np.arange(len(batches)), batches.mean(1))[0, 1]) < 0.2


@pytest.mark.parametrize("arguments", [([], 4), ([1], 0)])
def test_no_rows_or_no_batch_size_is_an_error(arguments):
    with pytest.raises(DataError):
        LengthBucketedSampler(*arguments)
