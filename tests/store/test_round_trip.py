import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finegraft import store
from finegraft.errors import StoreError
from tests.store.examples import SMALL, manifest, same

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64),
]


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    bits = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=bits)
    return raw[..., 0] > 127 if dtype == torch.bool else raw.view(dtype).reshape(shape)


NAMES = st.text("abc.0_-/ß", min_size=1, max_size=12).filter(lambda name: ".." not in name and name[0] != "/")


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, tensors(), max_size=4))
def test_any_tensors_come_back_bit_for_bit(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("graft")
    store.write(path, content, manifest(), card="")
    assert same(store.read(path)[0], content)


def test_the_manifest_comes_back_with_the_digest_of_the_tensors(tmp_path):
    store.write(tmp_path / "g", SMALL, manifest(), card="")
    found = store.read(tmp_path / "g")[1]
    assert found == manifest(tensors_sha256=found.tensors_sha256)
    assert len(found.tensors_sha256) == 64
    assert store.read_manifest(tmp_path / "g") == found


def test_equal_grafts_give_equal_files(tmp_path):
    for name in ("one", "two"):
        store.write(tmp_path / name, SMALL, manifest(), card="card")
    for file in store.FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_views_shared_memory_and_parameters_are_saved_as_what_they_show(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    content = {
        "transposed": weight.t(),
        "row": weight[1],
        "again": weight[1],
        "all": weight,
        "alias": weight,
        "expanded": weight[:1].expand(5, 4),
        "parameter": torch.nn.Parameter(weight[:, ::2]),
    }
    store.write(tmp_path / "g", content, manifest(), card="")
    assert same(store.read(tmp_path / "g")[0], {name: t.detach().contiguous() for name, t in content.items()})
    assert store.size(tmp_path / "g") < 4096  # a view never drags its whole storage along


def test_what_was_read_is_independent_of_the_file(tmp_path):
    store.write(tmp_path, SMALL, manifest(), card="")
    found = store.read(tmp_path)[0]
    with open(tmp_path / "graft.safetensors", "r+b") as file:
        file.write(bytes(os.path.getsize(tmp_path / "graft.safetensors")))
    assert same(found, SMALL)


def test_size_is_that_of_the_three_files(tmp_path):
    store.write(tmp_path / "g", SMALL, manifest(), card="four")
    (tmp_path / "g" / "notes.txt").write_text("mine")
    assert store.size(tmp_path / "g") == sum(os.path.getsize(tmp_path / "g" / name) for name in store.FILES)
    (tmp_path / "g" / "README.md").unlink()
    assert store.size(tmp_path / "g") == sum(os.path.getsize(tmp_path / "g" / n) for n in store.FILES[:2])


def test_files_are_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").write_text("")
    store.write(tmp_path / "g", SMALL, manifest(), card="")
    modes = {(tmp_path / "g" / name).stat().st_mode for name in store.FILES}
    assert modes == {(tmp_path / "other").stat().st_mode}


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
    ],
)
def test_a_tensor_that_cannot_be_stored_is_named_before_anything_is_written(tmp_path, tensor, reason):
    with pytest.raises(StoreError, match=f"layer.a.*{reason}"):
        store.write(tmp_path / "g", {"layer.a": tensor}, manifest(), card="")
    assert list(tmp_path.iterdir()) == []
