"""Where the default learning rates of the catalogue come from: every selective method at several rates.

    python benchmarks/learning_rates.py                       # all methods, about half an hour on one core
    python benchmarks/learning_rates.py --only lift --rates 1e-3 2e-3

SST-2 on MiniLM, with rows that the comparison of methods (``selective_quality.py``) does not see: training examples
after its first 1,000, scored on the test sentences. Without ``--rates`` a method is tried at its default and at three
times it, and then further up or down in steps of three while that scores better. Finished runs are lines of
``results/learning_rates.jsonl``.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import quality_run
from lines import append, read_lines
from quality_comparison import RESULTS
from quality_contenders import ENTRANTS, Entrant
from quality_run import DATA, Job, Settings, run

LINES = RESULTS / "learning_rates.jsonl"
TABLE = RESULTS / "learning_rates.md"
SETTINGS = Settings(rows=600, epochs=2)
SKIPPED = 1000
STEP = 3.0
TRIES = 5


@dataclass(frozen=True, eq=False)
class AtRate(Entrant):
    """An entrant at a learning rate of its own."""

    lr: float = 0.0

    @property
    def recipe(self) -> Any:
        return super().recipe.override(lr=self.lr)


def main() -> int:
    parser = argparse.ArgumentParser(description="Methods at several learning rates.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the methods")
    parser.add_argument("--rates", nargs="+", type=float, metavar="LR", help="rates instead of multiples of defaults")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train = Path(folder) / "train.csv"
        _write_rest(train)
        quality_run.FILES["sst2"] = (str(train), "sst2/test.csv")
        for entrant in ENTRANTS:
            if entrant.method is not None and (not options.only or entrant.name in options.only):
                _try(entrant, options.rates)
    _write_table()
    return 0


def _try(entrant: Entrant, rates: list[float] | None) -> None:
    start = entrant.recipe.train.lr
    scores = {rate: _score(entrant, rate) for rate in rates or (start, _rounded(start * STEP))}
    while rates is None and len(scores) < TRIES:
        best = max(scores, key=lambda rate: scores[rate])
        if best not in (min(scores), max(scores)):
            break
        rate = _rounded(best * STEP if best == max(scores) else best / STEP)
        scores[rate] = _score(entrant, rate)


def _rounded(rate: float) -> float:
    return float(f"{rate:.1g}")


def _score(entrant: Entrant, rate: float) -> float:
    at_rate = AtRate(entrant.name, entrant.method, entrant.role, entrant.changes, lr=rate)
    job = Job(at_rate, "sst2", 0, replace(SETTINGS, version=SKIPPED))
    row = read_lines(LINES).get(job.key)
    if row is None:
        row = run(job)
        append(LINES, row)
        print(f"{entrant.name} at {rate:g}: {row['accuracy']:.3f}, {row['seconds']:.0f} s", flush=True)
    return row["accuracy"]


def _write_rest(path: Path) -> None:
    with open(DATA / "sst2/train.csv", newline="", encoding="utf-8") as source:
        header, *rows = csv.reader(source)
    with open(path, "w", newline="", encoding="utf-8") as target:
        csv.writer(target).writerows([header, *rows[SKIPPED:]])


def _write_table() -> None:
    found: dict[str, dict[float, float]] = {}
    for row in read_lines(LINES).values():
        found.setdefault(row["entrant"], {})[row["lr"]] = row["accuracy"]
    lines = [
        "# Methods at several learning rates",
        "",
        f"`python benchmarks/learning_rates.py`: MiniLM on SST-2, {SETTINGS.rows} training examples that the",
        f"comparison of methods does not see, {SETTINGS.epochs} epochs, one seed; accuracy on 1,821 test sentences.",
        "Differences below two points are within the noise of a seed.",
        "",
        "| method | accuracy at rate |",
        "| --- | --- |",
    ]
    for name, scores in sorted(found.items()):
        cells = ", ".join(f"{scores[rate]:.3f} at {rate:g}" for rate in sorted(scores))
        lines.append(f"| {name} | {cells} |")
    TABLE.write_text("\n".join(lines) + "\n")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    sys.exit(main())
