import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finegraft import store
from finegraft.errors import BaseMismatch, StoreError
from finegraft.store.fingerprints import SAMPLES, sample_positions


def model(seed: int = 0, width: int = 40) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(100, width, generator=rng),
        "norm.weight": torch.ones(width),
        "scale": torch.tensor(0.5),
        "empty": torch.zeros(0, 3),
    }


def of(tensors: dict[str, torch.Tensor], **options) -> store.Fingerprint:
    return store.fingerprint(tensors.items(), **options)


def test_counts_are_those_of_the_base():
    found = of(model(), name="owner/base")
    assert (found.tensors, found.parameters, found.name) == (4, 100 * 40 + 40 + 1, "owner/base")


def test_the_same_in_any_order_and_memory_layout():
    tensors = model()
    backwards = dict(reversed(tensors.items()))
    strided = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in tensors.items()}
    assert of(tensors) == of(backwards) == of(strided)


def test_the_same_in_float32_and_bfloat16():
    tensors = model()
    loaded = {name: t.to(torch.bfloat16) for name, t in tensors.items()}
    back = {name: t.to(torch.float32) for name, t in loaded.items()}
    assert of(tensors) == of(loaded) == of(back)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.complex64])
def test_tensors_of_any_type_count(dtype):
    zeros, ones = (of({"t": make(3, 4).to(dtype)}) for make in (torch.zeros, torch.ones))
    assert zeros.structure == ones.structure
    assert zeros.content != ones.content


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**12))
def test_samples_are_few_and_reach_from_first_to_last(count):
    positions = sample_positions(count)
    assert len(positions) == min(count, SAMPLES)
    assert len(set(positions.tolist())) == len(positions)
    if count:
        assert (positions[0], positions[-1]) == (0, count - 1)
        steps = positions.diff()
        assert not steps.numel() or steps.max() - steps.min() <= 1


@pytest.mark.parametrize("position", [0, -1])
def test_the_first_and_the_last_entry_count(position):
    changed = model(width=4000)
    changed["embed"].view(-1)[position] += 1
    assert of(changed).content != of(model(width=4000)).content


def test_large_tensors_are_quick():
    large = torch.zeros(1).expand(10**6, 10**5)  # 10^11 entries, 4 bytes of memory
    begin = time.perf_counter()
    assert of({"large": large}).parameters == 10**11
    assert time.perf_counter() - begin < 2


def test_names_cannot_be_shifted_into_values():
    assert of({"ab": torch.zeros(1)}).structure != of({"a": torch.zeros(1)}).structure
    assert of({"a": torch.zeros(2, 3)}).structure != of({"a": torch.zeros(3, 2)}).structure


def test_check_accepts_the_same_base_under_another_name():
    store.check(of(model(), name="owner/base"), of(model(), name="/models/base"))


def test_check_says_that_only_values_differ_and_names_both():
    expected, actual = of(model(), name="owner/one"), of(model(seed=1), name="owner/two")
    with pytest.raises(BaseMismatch, match="same architecture with other values") as caught:
        store.check(expected, actual)
    for part in ("owner/one", "owner/two", expected.content[:12], actual.content[:12]):
        assert part in str(caught.value)


def test_check_says_that_the_architecture_differs_and_by_how_much():
    with pytest.raises(BaseMismatch, match=r"another architecture.*\+0 tensors and \+101 parameters"):
        store.check(of(model()), of(model(width=41)))
    renamed = {f"model.{name}": t for name, t in model().items()}
    with pytest.raises(BaseMismatch, match="names or shapes differ"):
        store.check(of(model()), of(renamed))


def test_a_base_without_values_is_refused_by_name():
    with pytest.raises(StoreError, match="'w' is on the meta device"):
        of({"w": torch.empty(3, device="meta")})


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(StoreError, match="two tensors named 'w'"):
        store.fingerprint([("w", torch.zeros(1)), ("w", torch.zeros(1))])
