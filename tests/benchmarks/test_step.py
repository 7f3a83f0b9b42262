"""The step benchmark runs and fills its tables; the figures of a tiny model mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step.py"


@pytest.mark.slow
def test_quick_run_fills_every_table(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--only", "lora", "s2ft 1%", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    for group in found["steps"].values():
        assert [s["contender"] for s in group] == ["PEFT LoRA", "lora", "s2ft 1%", "PEFT LoRA, again"]
        assert all(s["milliseconds"] > 0 and len(s["ratios"]) == 3 for s in group)
        assert group[0]["ratio"] == 1.0
        assert all(s["memory"] > 0 for s in group[:3])
        assert group[0]["trained"] == group[1]["trained"]
    assert len(found["steps"]) == 1
    assert [k["contender"] for k in found["kept"]] == ["the floor", "lora", "s2ft 1%"]
    assert {v["figure"].split(",")[0] for v in found["targets"]} == {"noise", "time", "memory", "kept"}
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| lora |", "| s2ft 1% |"))]
    assert len(rows) == 2 + 2 + len(found["targets"]) - len(found["steps"])


@pytest.mark.slow
def test_unknown_contender_is_refused_by_name():
    done = subprocess.run([sys.executable, str(SCRIPT), "--only", "loraa"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "loraa" in done.stderr
