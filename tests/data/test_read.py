"""Tables from files and folders, and the errors of what is no table."""

import json
import os

import datasets
import pytest
from PIL import Image

from finegraft.data.read import at_most, read_data, read_table
from finegraft.data.task import Data, Task
from finegraft.errors import DataError

ROWS = [{"text": "a good film", "label": 1}, {"text": "a bad, long one", "label": 0}]


@pytest.fixture
def files(tmp_path):
    """The same two rows in every format."""
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text('text,label\na good film,1\n"a bad, long one",0\n')
    (tmp_path / "rows.tsv").write_text("text\tlabel\na good film\t1\na bad, long one\t0\n")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_rows(files, ending):
    assert read_table(files / f"rows.{ending}").to_list() == ROWS


def test_words_that_look_like_missing_values_stay_words(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\nNA,true\nnull,false\n"two\nlines",true\n')
    rows = read_table(tmp_path / "a.csv")
    assert rows["text"][:] == ["NA", "null", "two\nlines"]
    assert rows["label"][:] == ["true", "false", "true"]


def test_a_text_file_is_one_row_a_line_or_one_in_all(tmp_path):
    (tmp_path / "a.txt").write_text("To be,\n\nor not\n")
    assert read_table(tmp_path / "a.txt")["text"][:] == ["To be,", "", "or not"]
    assert read_table(tmp_path / "a.txt", whole_text=True)["text"][:] == ["To be,\n\nor not\n"]


def test_an_edited_file_is_an_edited_table_even_with_the_old_time_stamp(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\nold\n")
    stamp = os.stat(path)
    assert read_table(path)["text"][:] == ["old"]
    path.write_text("text\nnew\n")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert read_table(path)["text"][:] == ["new"]


@pytest.fixture
def with_splits(tmp_path):
    path = tmp_path / "all.csv"
    path.write_text("text,split\na,train\nb,dev\nc,train\nd,test\n")
    return path


def test_a_split_column_gives_each_purpose_its_rows(with_splits):
    tables = read_data(Task(kind="classification"), Data(train=with_splits, eval=with_splits, test=with_splits))
    assert [rows["text"][:] for rows in (tables.train, tables.eval, tables.test)] == [
        ["a", "c"],
        ["b"],
        ["d"],
    ]


def test_a_suffix_has_precedence_over_the_purpose(with_splits):
    assert read_table(f"{with_splits}:test", split="train")["text"][:] == ["d"]


def test_a_file_without_splits_is_taken_whole(files):
    assert len(read_table(files / "rows.csv", split="validation")) == 2
    with pytest.raises(DataError, match="no column 'split'"):
        read_table(f"{files / 'rows.csv'}:train")


def test_a_split_that_is_not_there_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,split\na,train\nb,dev\n")
    with pytest.raises(DataError, match="no rows of split 'test'; its splits: dev, train"):
        read_table(tmp_path / "a.csv", split="test")


def test_an_image_folder_has_a_class_for_each_sub_folder(tmp_path):
    for name, grey in (("cat", 0), ("dog", 255)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("L", (4, 4), grey).save(tmp_path / "pictures" / name / "1.png")
    rows = read_table(tmp_path / "pictures", split="validation")
    assert rows.features["label"].names == ["cat", "dog"]
    assert [row["image"].getpixel((0, 0)) for row in rows] == [0, 255]


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("absent.csv", None, "no such file or folder: .*absent.csv"),
        ("absent.txt", None, "no such file or folder"),
        ("notes.md", "hello", "cannot read a .md file.*known endings: .csv"),
        ("empty.csv", "", "is empty"),
        ("header.csv", "text,label\n", "has no rows"),
        ("broken.csv", "a,b\n1\n", "cannot be read as csv"),
        ("broken.jsonl", '{"a": 1}\n{"a"', "cannot be read as jsonl"),
        ("broken.json", '[{"a": 1}, 2]', "cannot be read as json"),
        ("broken.parquet", "no parquet", "cannot be read as parquet"),
    ],
)
def test_what_is_no_table_is_an_error_that_names_the_file(tmp_path, name, content, part):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=part) as error:
        read_table(tmp_path / name)
    assert name in str(error.value)


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(DataError, match="not a folder of images"):
        read_table(tmp_path)


def test_a_data_set_that_the_hub_does_not_give_is_an_error(monkeypatch):
    def refuse(*arguments):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="owner/name.*neither a file.*no network"):
        read_table("owner/name:config")


def test_the_hub_is_asked_for_the_configuration_and_the_split(monkeypatch):
    asked = []

    def give(*arguments):
        asked.append(arguments)
        tables = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "validation")}
        return datasets.DatasetDict(tables)

    monkeypatch.setattr(datasets, "load_dataset", give)
    assert read_table("owner/name:small", split="validation")["text"][:] == ["validation"]
    assert read_table("owner/name:small:train", split="validation")["text"][:] == ["train"]
    assert asked == [("owner/name", "small")] * 2
    with pytest.raises(DataError, match="no split 'test'; its splits: train, validation"):
        read_table("owner/name", split="test")


def test_a_limit_keeps_rows_from_everywhere():
    rows = datasets.Dataset.from_dict({"label": [0] * 50 + [1] * 50})
    assert at_most(rows, 10)["label"][:] == [0] * 5 + [1] * 5
    assert at_most(rows, None) is rows and at_most(rows, 100) is rows


def test_a_column_that_is_there_twice_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,text\na,1,b\n")
    with pytest.raises(DataError, match="has the column 'text' more than once"):
        read_table(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", b"text,label\ncaf\xe9,1\n"),
        ("b.csv", b"caf\xe9,label\na,1\n"),
        ("a.tsv", b"text\tlabel\ncaf\xe9\t1\n"),
        ("a.txt", b"caf\xe9\n"),
        ("a.json", b'[{"text": "caf\xe9"}]'),
        ("a.jsonl", b'{"text": "caf\xe9"}\n'),
    ],
)
def test_another_encoding_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is not UTF-8"):
        read_table(tmp_path / name)
