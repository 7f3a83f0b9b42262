"""Tables from local files, image folders and the Hub, as :class:`datasets.Dataset`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from finegraft.data.task import Data, Task
from finegraft.errors import DataError

_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]*))?(:(?P<split>[\w.]+))?")


@dataclass(frozen=True)
class Tables:
    """The rows of :class:`~finegraft.data.task.Data`, read but not yet prepared."""

    data: Data
    train: datasets.Dataset | None
    eval: datasets.Dataset
    test: datasets.Dataset | None


def read_data(task: Task, data: Data) -> Tables:
    """Read every table that ``data`` names.

    A text file is one row a line, but one row in all for causal-lm, whose line breaks are text as well.

    Raises:
        DataError: see :func:`read_table`.
    """
    whole = task.kind == "causal-lm"
    train, test = (
        read_table(source, split=split, whole_text=whole) if source else None
        for source, split in ((data.train, "train"), (data.test, "test"))
    )
    return Tables(data, train, read_table(data.eval, split="validation", whole_text=whole), test)


def read_table(source: str | Path, *, split: str = "train", whole_text: bool = False) -> datasets.Dataset:
    """Read one table.

    Local files are read anew each time, never from a cache, so that an edited file is an edited table.

    Args:
        source: a ``.csv``, ``.tsv``, ``.jsonl``, ``.json``, ``.parquet`` or ``.txt`` file; a folder of images
            with one sub-folder for each class; or a data set of the Hub (``owner/name``,
            ``owner/name:config``, ``owner/name:config:split``).
        split: ``train``, ``validation`` or ``test``: the part to take from a data set of the Hub, or from a
            file whose ``split`` column, or a folder whose sub-folders, have these names (other files and
            folders are taken whole). A suffix, as in ``reviews.parquet:test``, has precedence. Default
            ``train``.
        whole_text: read a ``.txt`` file as one row instead of one row a line; default False.

    Returns:
        The rows. Text files have one column, ``text``; image folders have ``image`` and ``label``.

    Raises:
        DataError: no such file or data set, a file of an unknown type, one that cannot be parsed, no rows, no
            such split.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "reviews.csv")
        >>> _ = path.write_text("text,label\\ngood,1\\n")
        >>> read_table(path)[0]
        {'text': 'good', 'label': 1}
    """
    name, asked = _suffix(str(source))
    path = Path(name).expanduser()
    if path.is_dir():
        rows = _image_folder(path, asked=asked, split=split)
    elif path.is_file():
        rows = _pick_split(_read_file(path, whole_text=whole_text), path, asked=asked, split=split)
    elif path.suffix.lower() in (*_READERS, ".txt") or not _HUB_ID.fullmatch(str(source)) or name.startswith("."):
        raise DataError(f"no such file or folder: {path} (looked in {Path.cwd()})")
    else:
        rows = _from_hub(str(source), split)
    if len(rows) == 0:
        raise DataError(f"{source} has no rows; a table needs a header and at least one row")
    return rows


def _suffix(source: str) -> tuple[str, str | None]:
    """The path and the split of ``path:split``."""
    path, colon, split = source.rpartition(":")
    return (path, _SPLITS[split]) if colon and split in _SPLITS else (source, None)


def _block_size(path: Path) -> int:
    """One block for the whole file (up to 1 GB): Arrow infers the type of a column from the first block."""
    return min(max(path.stat().st_size + 1, 1 << 16), 1 << 30)


def _csv(path: Path, delimiter: str = ",") -> pa.Table:
    # only an empty cell is missing: "NA", "null" or "true" are words that a text or a label may consist of
    table = pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(block_size=_block_size(path)),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(null_values=[""], true_values=[], false_values=[]),
    )
    if any(pa.types.is_binary(kind) for kind in table.schema.types):  # what Arrow makes of texts in another encoding
        raise _not_utf8(path)
    return table


def _tsv(path: Path) -> pa.Table:
    return _csv(path, "\t")


def _jsonl(path: Path) -> pa.Table:
    table = pa.json.read_json(path, read_options=pa.json.ReadOptions(block_size=_block_size(path)))
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        raise _not_utf8(path) from error
    return table


def _json(path: Path) -> pa.Table:
    with path.open(encoding="utf-8") as file:
        if not file.read(1024).lstrip().startswith("["):
            return _jsonl(path)
        file.seek(0)
        rows = json.load(file)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _parquet(path: Path) -> pa.Table:
    return pa.parquet.read_table(path, partitioning=None)


def _text(path: Path, whole_text: bool) -> pa.Table:
    text = path.read_text(encoding="utf-8-sig")
    rows = [text] if whole_text else text.removesuffix("\n").split("\n")
    return pa.table({"text": pa.array(rows, pa.string())})


_READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}


def _read_file(path: Path, *, whole_text: bool) -> datasets.Dataset:
    ending = path.suffix.lower()
    if ending != ".txt" and ending not in _READERS:
        allowed = ", ".join([*_READERS, ".txt"])
        raise DataError(f"{path}: cannot read a {ending or 'nameless'} file as a table; known endings: {allowed}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; a table needs a header and at least one row")
    try:
        table = _text(path, whole_text) if ending == ".txt" else _READERS[ending](path)
        _require_distinct(table.column_names, path)
        return datasets.Dataset(table)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except (pa.ArrowException, ValueError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{path} cannot be read as {ending[1:]}: {error}") from error


def _require_distinct(names: list[str], path: Path) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has the column {twice!r} more than once; give each column a name of its own")


def _not_utf8(path: Path) -> DataError:
    return DataError(f"{path} is not UTF-8; save it in that encoding")


def _pick_split(rows: datasets.Dataset, path: Path, *, asked: str | None, split: str) -> datasets.Dataset:
    values = rows.data.column("split").unique().to_pylist() if "split" in rows.column_names else []
    if not values or any(value not in _SPLITS for value in values):
        if asked:
            raise DataError(
                f"{path}:{asked} asks for a split, but the file has no column 'split' with only "
                f"train, validation or test in it (columns: {', '.join(rows.column_names)})"
            )
        return rows
    if len(values) == 1 and not asked:
        return rows
    wanted = asked or _SPLITS.get(split, split)
    words = [value for value in values if _SPLITS[value] == wanted]
    if not words:
        raise DataError(f"{path} has no rows of split {wanted!r}; its splits: {', '.join(sorted(values))}")
    return datasets.Dataset(rows.data.table.filter(pc.is_in(rows.data.column("split"), pa.array(words))))


def _image_folder(path: Path, *, asked: str | None, split: str) -> datasets.Dataset:
    try:
        found = datasets.load_dataset("imagefolder", data_dir=str(path), drop_labels=False)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(f"{path} is not a folder of images with one sub-folder for each class: {error}") from error
    if len(found) == 1 and not asked:
        return next(iter(found.values()))
    return _split_of(found, str(path), asked or split)


def _from_hub(source: str, split: str) -> datasets.Dataset:
    parts = _HUB_ID.fullmatch(source)
    assert parts is not None
    try:
        found = datasets.load_dataset(parts["id"], parts["config"] or None)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source} is neither a file or folder in {Path.cwd()} nor a data set that the Hub gave: {error}"
        ) from error
    return _split_of(found, source, parts["split"] or split)


def _split_of(found: datasets.DatasetDict, source: str, split: str) -> datasets.Dataset:
    for name in found:
        if _SPLITS.get(str(name), name) == split:
            return found[name]
    raise DataError(f"{source} has no split {split!r}; its splits: {', '.join(map(str, found))}")


def at_most(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """At most ``limit`` rows, evenly spaced, so that a table sorted by class keeps all its classes."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(np.linspace(0, len(rows) - 1, limit).round().astype(int))
