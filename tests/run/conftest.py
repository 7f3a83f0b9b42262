"""A tiny base, tiny tables, and a configuration that trains on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.run.tiny import rows_of, write_rows, write_text_base

Configure = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    write_text_base(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tables")
    return {
        "train": write_rows(folder / "train.jsonl", rows_of("classification", 60, 0)),
        "eval": write_rows(folder / "eval.jsonl", rows_of("classification", 40, 1)),
    }


@pytest.fixture
def configure(text_base: str, tables: dict[str, str], tmp_path: Path) -> Configure:
    """Makes configurations; keywords replace top-level settings, ``train`` is merged into the default one."""

    def made(*, out: str = "run", train: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
        return {
            "base": text_base,
            "task": {"kind": "classification"},
            "data": tables,
            "method": {"name": "lora", "rank": 2, "dropout": 0.1},
            "train": {"epochs": 3, "batch_size": 8, "lr": 0.02, "precision": "fp32"} | (train or {}),
            "seed": 1,
            "out": str(tmp_path / out),
        } | settings

    return made
