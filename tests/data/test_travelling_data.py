"""The data that travels with the repository is what its README says."""

import pyarrow.parquet as pq
import pytest

from finegraft.data.read import read_table
from tests.data.conftest import DATA


@pytest.mark.parametrize("split, rows, positive", [("train", 6920, 3610), ("dev", 872, 444), ("test", 1821, 909)])
def test_sst2_has_all_rows_of_the_official_splits(split, rows, positive):
    labels = read_table(DATA / f"sst2/{split}.csv")["label"][:]
    assert (len(labels), sum(labels)) == (rows, positive)


@pytest.mark.parametrize("split, each", [("train", 200), ("test", 90)])
def test_fashion_mnist_is_balanced(split, each):
    labels = read_table(DATA / f"fashion_mnist/{split}.parquet")["label"][:]
    assert [labels.count(label) for label in range(10)] == [each] * 10


@pytest.mark.parametrize("split, each", [("train", 48), ("test", 15)])
def test_spoken_digits_are_balanced(split, each):
    table = pq.read_table(DATA / f"fsdd/{split}.parquet")
    labels = table["label"].to_pylist()
    assert [labels.count(label) for label in range(10)] == [each] * 10
    assert str(table.schema.field("waveform").type) == "list<element: int16>"


def test_the_folder_stays_small():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 9e6
