"""How the tests here tell what they measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Keep figures in the JUnit report, and print them under ``pytest -s``."""

    def tell(**figures: float) -> None:
        for name, value in figures.items():
            record_property(name, round(value, 4))
        print(" ".join(f"{name}={value:.4g}" for name, value in figures.items()))

    return tell


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
