"""The benchmark of quality runs, never repeats what is done, and fills its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import lines
    import quality_contenders
    import quality_run
    import quality_table

    return quality_contenders, quality_run, quality_table, lines


def rows_of(run, entrant, gain):
    settings = run.Settings()
    jobs = [run.Job(entrant, task, seed, settings) for task in ("sst2", "trec") for seed in range(3)]
    return [
        {
            "key": job.key,
            "entrant": entrant.name,
            "task": job.task,
            "seed": job.seed,
            "accuracy": 0.8 + gain + 0.001 * job.seed,
            "probe": 0.7 - gain,
            "trained": 100,
            "lr": 1e-3,
            "training_seconds": 1.0,
        }
        for job in jobs
    ]


def test_every_entrant_is_a_method_and_has_a_key_of_its_own(modules):
    contenders, run, *_ = modules
    keys = [run.Job(entrant, "sst2", 0, run.Settings()).key for entrant in contenders.ENTRANTS]
    assert len(set(keys)) == len(contenders.ENTRANTS)
    assert len({entrant.name for entrant in contenders.ENTRANTS}) == len(contenders.ENTRANTS)


def test_a_key_follows_the_recipe_the_task_the_seed_and_the_sizes(modules):
    contenders, run, *_ = modules
    entrant, settings = contenders.RANDOM, run.Settings()
    changed = contenders.Entrant(entrant.name, "apet", "random", {"lr": 1e-5})
    jobs = [
        run.Job(entrant, "sst2", 0, settings),
        run.Job(changed, "sst2", 0, settings),
        run.Job(entrant, "trec", 0, settings),
        run.Job(entrant, "sst2", 1, settings),
        run.Job(entrant, "sst2", 0, run.Settings(epochs=5)),
    ]
    assert len({job.key for job in jobs}) == len(jobs)
    assert run.Job(entrant, "sst2", 0, run.Settings()).key == jobs[0].key


def test_claims_are_computed_from_the_numbers(modules):
    contenders, run, table, _ = modules
    informed = next(e for e in contenders.ENTRANTS if e.role == "informed")
    gains = {contenders.RANDOM: 0.0, informed: 0.02, contenders.FULL: -0.01, contenders.LORA: 0.05}
    runs = {e: rows_of(run, e, gains[e]) if e in gains else [] for e in contenders.ENTRANTS}
    text = table.page(runs, {"sst2": 0.8, "trec": 0.7}, run.Settings(), 3, ["--table"])
    claims = {line.split(":")[0]: line for line in text.splitlines() if line.startswith("- ")}
    assert "**shows**" in claims["- Informed selection beats random entries (apet)"]
    beside_lora = claims["- Chosen parts at this budget beat PEFT LoRA of as many numbers"]
    assert "**does not show at this scale**" in beside_lora
    assert "**shows**" not in claims["- Sparse tuning forgets less than full fine-tuning"]
    assert "head only (0 of 6 runs)" in text


def test_a_line_that_was_cut_off_is_done_again_and_harms_no_other(modules, tmp_path):
    *_, lines = modules
    path = tmp_path / "lines.jsonl"
    lines.append(path, {"key": "a", "accuracy": 1})
    with open(path, "a") as file:
        file.write('{"key": "b", "accu')
    lines.append(path, {"key": "c", "accuracy": 0})
    assert sorted(lines.read_lines(path)) == ["a", "c"]


@pytest.mark.slow
def test_a_small_run_ends_and_is_not_repeated(tmp_path):
    lines, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    command = [sys.executable, str(FOLDER / "selective_quality.py"), "--rows", "32", "--epochs", "1", "--seeds", "1"]
    command += ["--only", "apet (random entries)", "PEFT LoRA", "--lines", str(lines), "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {(row["entrant"], row["task"]) for row in rows} == {
        (name, task) for name in ("apet (random entries)", "PEFT LoRA") for task in ("sst2", "trec")
    }
    assert all(abs(row["trained"] / 113_566 - 1) < 0.02 for row in rows)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "4 of 4 runs are done" in again.stdout
    assert len(lines.read_text().splitlines()) == 4
    assert "| apet (random entries) | random |" in page.read_text()
