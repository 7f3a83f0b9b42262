"""Checkpoints: everything that resuming needs and nothing else, as safetensors and JSON.

A checkpoint is a folder ``checkpoint-<step>``:

=========================  ==========================================================
``trained.safetensors``    what trains: :meth:`Graft.state`
``optimizer.safetensors``  the optimizer's tensors, named ``<parameter number>/<name>``
``rng-<rank>.safetensors`` states of the random generators of one process
``checkpoint.json``        the optimizer's and the scheduler's numbers, losses so far
``trainer_state.json``     the training loop's counters and log
=========================  ==========================================================

It appears under its name only when it is complete: it is written beside it and renamed.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finegraft.errors import StoreError

FORMAT = 1
TRAINED, OPTIMIZER, FACTS, LOOP_STATE = (
    "trained.safetensors",
    "optimizer.safetensors",
    "checkpoint.json",
    "trainer_state.json",
)
_NAME = re.compile(r"checkpoint-(\d+)")


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the name ``folder`` when the block ends, and vanishes if it fails.

    Raises:
        StoreError: the disk is full or the place cannot be written; what was there before is intact.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            _flush(file)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
        _flush(folder.parent)
    except OSError as error:
        raise StoreError(
            f"cannot write {folder}: {error.strerror or error}; nothing was left there, and what was saved "
            "earlier is intact"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's folder, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def keep_newest(folder: Path, count: int) -> None:
    """Deletes all but the ``count`` newest checkpoints of a run."""
    existing = checkpoints(folder)
    for path in existing[: len(existing) - count]:
        shutil.rmtree(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as they are on the processor, each contiguous."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads what :func:`write_tensors` wrote.

    Raises:
        StoreError: the file is missing, truncated or no safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot read {path}: {error}; resume from an earlier checkpoint or start afresh") from error


def read_facts(folder: Path) -> dict[str, Any]:
    """The numbers of a checkpoint.

    Raises:
        StoreError: the file is missing or damaged, or of a format that this version does not know.
    """
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}; resume from an earlier checkpoint or start afresh") from error
    if facts.get("format") != FORMAT:
        raise StoreError(f"{path} has format {facts.get('format')!r}; this version of finegraft reads format {FORMAT}")
    return facts


def split_optimizer_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's ``state_dict`` as named tensors and plain data."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"numbers": numbers, "groups": state["param_groups"]}


def join_optimizer_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`split_optimizer_state`."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in plain["numbers"].items()}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in plain["groups"]]
    return {"state": state, "param_groups": groups}


def write_random_state(folder: Path, rank: int) -> None:
    """Stores the states of Python's, NumPy's and PyTorch's global generators in one safetensors file."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    rest = [numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]]
    facts = {"version": version, "gauss": gauss, "numpy": rest}
    save_file(tensors, _random_file(folder, rank), metadata={"generators": json.dumps(facts)})


def restore_random_state(folder: Path, rank: int) -> None:
    """Puts the global generators into the state that :func:`write_random_state` stored."""
    path = _random_file(folder, rank)
    tensors = read_tensors(path)
    facts = json.loads(_metadata(path)["generators"])
    random.setstate((facts["version"], tuple(tensors["python"].tolist()), facts["gauss"]))
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *facts["numpy"]))
    torch.set_rng_state(tensors["torch"])
    devices = [tensors[f"cuda/{i}"] for i in range(torch.cuda.device_count()) if f"cuda/{i}" in tensors]
    if devices:
        torch.cuda.set_rng_state_all(devices)


def _random_file(folder: Path, rank: int) -> Path:
    return folder / f"rng-{rank}.safetensors"


def _metadata(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size))["__metadata__"]
