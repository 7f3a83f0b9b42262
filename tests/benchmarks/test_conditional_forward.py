"""The benchmark of conditional passes runs and fills its table; the figures of a tiny model mean nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "conditional_forward.py"


@pytest.mark.slow
def test_quick_run_fills_its_table(tmp_path):
    page = tmp_path / "page.md"
    command = [sys.executable, str(SCRIPT), "--quick", "--rounds", "1", "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.read_text().splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "the base",
        "adapters beside blocks, all tokens through",
        "coda",
        "dyt, all gates open",
        "dyt",
    ]
