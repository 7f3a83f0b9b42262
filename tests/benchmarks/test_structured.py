"""The benchmarks of structured methods run, keep what is done, and fill their tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def _done(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


def test_every_run_has_a_key_of_its_own_that_follows_its_settings(importable):
    from quality_run import Job, Settings
    from structured_quality import COMPARISON
    from structured_step import WHOLE, Task

    keys = [Job(entrant, "sst2", 0, Settings()).key for entrant in COMPARISON.entrants]
    assert len(set(keys)) == len(keys)
    from structured_contenders import PAIRS

    (shape, rounds), _ = WHOLE.steps
    tasks = [Task(pair, shape, n, clock) for pair in PAIRS.values() for n in (rounds, 0) for clock in (True, False)]
    assert len({task.key for task in tasks}) == len(tasks)


def test_a_method_and_pefts_stand_side_by_side_with_the_same_rate(importable):
    from structured_quality import COMPARISON

    by_name = {entrant.name: entrant for entrant in COMPARISON.entrants}
    theirs = [entrant for entrant in COMPARISON.entrants if entrant.role == "peft"]
    assert len(theirs) > 10
    assert all(entrant.recipe.train.lr == by_name[entrant.method].recipe.train.lr for entrant in theirs)


def test_checks_of_quality_are_computed_from_the_numbers(importable):
    from quality_run import Settings
    from structured_quality import COMPARISON

    def rows(accuracy: float) -> list[dict[str, object]]:
        about = {"trained": 100, "lr": 1e-3, "training_seconds": 1.0}
        runs = [(task, seed) for task in ("sst2", "trec") for seed in range(2)]
        return [{"task": t, "seed": s, "accuracy": accuracy + 0.001 * s, **about} for t, s in runs]

    accuracy = {"head": 0.7, "vera": 0.8, "PEFT vera": 0.9, "lokr": 0.6, "PEFT lokr": 0.6}
    named = {("head" if e.role == "reference" else e.name): e for e in COMPARISON.entrants}
    runs = {entrant: [] for entrant in COMPARISON.entrants} | {named[n]: rows(a) for n, a in accuracy.items()}
    text = COMPARISON.page(runs, {}, Settings(), 2, ["--table"])
    broken, worse = (line for line in text.splitlines() if line.startswith("- "))
    assert "**missed**. Of 2 methods 1 are no better than a head alone: lokr." in broken
    assert "**missed**. Of 2 methods 1 are worse by more than 2 standard errors: vera." in worse


def test_limits_of_lines_hold(importable, capsys):
    import lines_of_code

    assert lines_of_code.main(["--check"]) == 0
    assert "deltas.random_basis" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_are_measured_once_and_fill_the_table(tmp_path):
    lines, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    given = ["--quick", "--only", "vera", "--lines", str(lines), "--out", str(page)]
    done = _done("structured_step.py", *given)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["shape"] for row in rows] == ["bert-tiny", "llama-tiny-bf16"]
    assert rows[0]["ours"]["trained"] == rows[0]["theirs"]["trained"]
    assert rows[0]["ours"]["memory"] > 0
    assert rows[0]["theirs"]["contender"] == "PEFT vera"
    again = _done("structured_step.py", *given, "--table")
    assert again.returncode == 0, again.stderr
    assert len(lines.read_text().splitlines()) == 2
    assert "| vera | " in page.read_text()
    assert "Not measured" not in page.read_text()


@pytest.mark.slow
def test_bytes_are_counted_beside_pefts(tmp_path):
    page = tmp_path / "page.md"
    done = _done("structured_bytes.py", "--quick", "--only", "vera", "hra", "svft", "--out", str(page))
    assert done.returncode == 0, done.stderr
    assert "Of 2 methods that PEFT has too, 0 keep more" in page.read_text()
