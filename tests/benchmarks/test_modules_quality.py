"""The benchmark of module methods takes in every row of their files, repeats nothing that is done, fills its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finegraft.registry import methods

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import modules_quality

    return modules_quality


def test_every_row_of_the_module_files_takes_part_once(script):
    names = script.entrants()
    assert len(set(names)) == len(names)
    assert {"head", "pfeiffer", "prefix-tuning", "lst", "hyperformer++"} <= set(names) <= set(methods)
    assert "lora" not in names


def test_a_key_follows_the_recipe_the_task_the_seed_and_the_sizes(script):
    settings = script.Settings()
    jobs = [
        script.Job("houlsby", "sst2", 0, settings),
        script.Job("pfeiffer", "sst2", 0, settings),
        script.Job("houlsby", "digits", 0, settings),
        script.Job("houlsby", "sst2", 1, settings),
        script.Job("houlsby", "sst2", 0, script.Settings(rows=10)),
    ]
    assert len({job.key for job in jobs}) == len(jobs)
    assert script.Job("houlsby", "sst2", 0, settings).key == jobs[0].key


def test_the_table_says_what_is_worse_than_a_head_alone_what_does_not_fit_and_what_is_missing(script):
    settings, done = script.Settings(), {}
    for name, accuracy in {"head": 0.7, "houlsby": 0.8, "pfeiffer": 0.6}.items():
        for task in script.TASKS:
            for seed in range(2):
                job = script.Job(name, task, seed, settings)
                about = {"key": job.key, "method": name, "task": task, "seed": seed}
                done[job.key] = {**about, "accuracy": accuracy, "trained": 100}
                if (name, task) == ("houlsby", "garments"):
                    done[job.key] = {**about, "unfit": "no site"}
    text = script.page(done, settings, 2, [])
    assert "| houlsby | 100 | 0.002 | 80.0 ± 0.0 | 80.0 ± 0.0 | 80.0 ± 0.0 | - | +10.0 |" in text
    assert "more than 2 points below it: pfeiffer (-10.0)" in text
    assert "compacter (0 of 8 runs)" in text
    assert "houlsby (" not in text


@pytest.mark.slow
def test_a_small_run_ends_and_is_not_repeated(tmp_path):
    lines, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    command = [sys.executable, str(FOLDER / "modules_quality.py"), "--rows", "16", "--epochs", "0.1", "--seeds", "1"]
    command += ["--only", "mip", "--tasks", "digits", "--lines", str(lines), "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["method"] for line in lines.read_text().splitlines()} == {"head", "mip"}
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "2 of 2 runs are done" in again.stdout
    assert "| mip |" in page.read_text()
