"""Comparisons of many ways to train: runs that are done once each, and a table of what is done."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lines import append, read_lines
from quality_contenders import Entrant
from quality_run import FILES, Job, Settings, run, untouched_probe

Row = dict[str, Any]
Runs = dict[Entrant, list[Row]]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Comparison:
    """Entrants that all train on the same tasks with some seeds.

    Attributes:
        name: of the files with finished runs and the table, in ``results``.
        entrants: who takes part.
        seeds: runs of each entrant on each task.
        page: the document, of finished runs by entrant, the probe of the untouched base by task, the settings, the
            number of seeds and the command line.
    """

    name: str
    entrants: Sequence[Entrant]
    seeds: int
    page: Callable[[Runs, dict[str, float], Settings, int, Sequence[str]], str]

    def main(self, arguments: list[str] | None = None) -> int:
        """Do what is missing and write the table; the exit status is 1 if a run failed."""
        options = self._options(arguments)
        settings = Settings(rows=options.rows, epochs=options.epochs)
        entrants = [e for e in self.entrants if not options.only or e.name in options.only]
        jobs = [Job(e, task, seed, settings) for seed in range(options.seeds) for task in FILES for e in entrants]
        done = read_lines(options.lines)
        missing = [job for job in jobs if job.key not in done]
        print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are done", flush=True)
        failures = _work([] if options.table else missing, options.lines, options.workers, options.threads)
        self._write_table(options, settings, sys.argv[1:] if arguments is None else arguments)
        for name, reason in failures:
            print(f"failed: {name}: {reason}", file=sys.stderr)
        return int(bool(failures))

    def _options(self, arguments: list[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description="Quality of methods on SST-2 and TREC.")
        names = [entrant.name for entrant in self.entrants]
        lines, page = (RESULTS / f"{self.name}.{end}" for end in ("jsonl", "md"))
        parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of: {', '.join(names)}")
        parser.add_argument("--workers", type=int, default=1, help="runs at a time, each a process (default 1)")
        parser.add_argument("--threads", type=int, default=1, help="threads of each (default 1)")
        parser.add_argument("--seeds", type=int, default=self.seeds, help="runs on each task (default %(default)s)")
        parser.add_argument("--rows", type=int, default=Settings.rows, help="training examples (default %(default)s)")
        parser.add_argument(
            "--epochs", type=int, default=Settings.epochs, help="passes over them (default %(default)s)"
        )
        parser.add_argument("--lines", type=Path, default=lines, metavar="FILE", help="where finished runs are kept")
        parser.add_argument("--out", type=Path, default=page, metavar="FILE", help="where the table goes")
        parser.add_argument("--table", action="store_true", help="run nothing, write the table of what is done")
        return parser.parse_args(arguments)

    def _write_table(self, options: argparse.Namespace, settings: Settings, arguments: Sequence[str]) -> None:
        done = read_lines(options.lines)
        rows = {entrant: _rows(entrant, done, settings, options.seeds) for entrant in self.entrants}
        untouched = {task: untouched_probe(task, settings) for task in FILES}
        options.out.write_text(self.page(rows, untouched, settings, options.seeds, arguments))
        print(f"wrote {options.out}", flush=True)


def _work(jobs: Sequence[Job], lines: Path, workers: int, threads: int) -> list[tuple[str, str]]:
    """Do the runs and note each as it ends; returns those that failed, with the reason."""
    failures: list[tuple[str, str]] = []
    began = time.monotonic()
    for count, (job, row, reason) in enumerate(_finished(jobs, workers, threads), 1):
        name = f"{job.entrant.name} on {job.task}, seed {job.seed}"
        left = (time.monotonic() - began) / count * (len(jobs) - count) / 60
        if row is None:
            failures.append((name, reason))
            print(f"{count}/{len(jobs)} {name}: FAILED: {reason}", flush=True)
            continue
        append(lines, row)
        figures = f"accuracy {row['accuracy']:.3f}, other task {row['probe']:.3f}, {row['trained']:,} numbers"
        print(f"{count}/{len(jobs)} {name}: {figures}, {row['seconds']:.0f} s; {left:.0f} min left", flush=True)
    return failures


def _finished(jobs: Sequence[Job], workers: int, threads: int) -> Iterator[tuple[Job, dict[str, Any] | None, str]]:
    if workers == 1:
        torch.set_num_threads(threads)
        for job in jobs:
            yield (job, *_attempt(job))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = {pool.submit(_attempt, job): job for job in jobs}
        for future in as_completed(futures):
            yield (futures[future], *future.result())


def _attempt(job: Job) -> tuple[dict[str, Any] | None, str]:
    # One method that fails must not cost the runs of the others
    try:
        return run(job), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _rows(entrant: Entrant, done: dict[str, dict[str, Any]], settings: Settings, seeds: int) -> list[dict[str, Any]]:
    jobs = [Job(entrant, task, seed, settings) for task in FILES for seed in range(seeds)]
    return [done[job.key] for job in jobs if job.key in done]
