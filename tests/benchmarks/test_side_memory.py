"""The benchmark of side networks' memory runs and fills its tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "side_memory.py"


@pytest.mark.slow
def test_quick_counts_fill_every_table(tmp_path):
    page = tmp_path / "page.md"
    command = [sys.executable, str(SCRIPT), "--quick", "--kept-only", "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in page.read_text().splitlines()]
    held = [(row[0].removeprefix("| "), float(row[3])) for row in lines if len(row) > 4 and row[1][:1].isdigit()]
    assert [name for name, _ in held] == ["PEFT LoRA", "lst", "qst", "levi"] * 2
    assert held[1][1] < held[0][1]
