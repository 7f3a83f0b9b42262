"""How well the catalogue's adapters, prompts, side networks and hyper-networks train, beside a head alone.

    python benchmarks/modules_quality.py --workers 2               # all runs, about two hours on two cores
    python benchmarks/modules_quality.py --only houlsby pfeiffer   # some of them; those that are done stay done
    python benchmarks/modules_quality.py --table                   # only write the table of what is done

SST-2 and TREC on MiniLM with 1,000 examples each, new speakers' digits and new garments on small transformers that know
others. Every method of the catalogue's module files takes part, with its defaults and at its rate. Every finished run
is one line of ``results/modules_quality.jsonl``, known by a digest of its recipe, task, seed and sizes, so the command
can be stopped and given again at any time. A method that no site of a model fits is noted so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

import torch
from torch import nn

import finegraft as fg
from finegraft.catalogue import rows as catalogue_rows
from finegraft.errors import SiteError
from finegraft.grafting import Graft
from finegraft.recipe import Recipe
from finegraft.registry import methods
from finegraft.train.cadence import Cadence
from finegraft.train.evaluation import batches_of, inferring
from finegraft.train.optimizers import training_arguments
from finegraft.train.progress import ProgressReport
from finegraft.train.trainer import GraftTrainer
from lines import append, digest, read_lines
from modules_tasks import NAMES, TASKS, Given, given
from tables import heading, table

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "modules_quality.jsonl"
TABLE = RESULTS / "modules_quality.md"
FAMILIES = ("adapters", "prompts", "side_networks", "hyper_networks")
HEAD = "head"
SEEDS = 2
EPOCHS = {"sst2": 2, "trec": 2, "digits": 20, "garments": 4}
CALIBRATION_BATCHES = 4
BROKEN = 0.02  # how far below a head alone a method's mean accuracy says that a default is wrong
CPU = torch.device("cpu")
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Attributes:
        rows: training examples at most.
        epochs: passes over them, as a share of each task's own number.
        batch_size: examples in a step.
        max_length: tokens of a sentence.
        version: of these files; another one makes all runs anew.
    """

    rows: int = 1000
    epochs: float = 1.0
    batch_size: int = 16
    max_length: int = 64
    version: int = 1


@dataclass(frozen=True)
class Job:
    """A run to be done: a method of the catalogue on a task."""

    method: str
    task: str
    seed: int
    settings: Settings

    @property
    def recipe(self) -> Recipe:
        return methods[self.method]

    @property
    def key(self) -> str:
        """What the run is known by."""
        recipe = {key: value for key, value in self.recipe.data().items() if key not in ("note", "source")}
        return digest([recipe, self.task, EPOCHS[self.task], self.seed, asdict(self.settings)])


def entrants() -> list[str]:
    """A head alone, and every method that the catalogue's module files have."""
    folder = Path(catalogue_rows.__file__).parent
    files = sorted(path for family in FAMILIES for path in folder.glob(f"{family}*.py"))
    return [HEAD, *(name for path in files for name in _filed(path))]


def _filed(path: Path) -> list[str]:
    """Names of the methods that a file of the catalogue files, found by running it."""
    names: list[str] = []
    with mock.patch.object(catalogue_rows, "method", lambda name, *_, **__: names.append(name)):
        runpy.run_path(str(path))
    return names


def run(job: Job) -> Row:
    """Train and score; returns one line of the results."""
    began = time.monotonic()
    about = {"key": job.key, "method": job.method, "task": job.task, "seed": job.seed}
    task = given(job.task, job.seed, rows=job.settings.rows, max_length=job.settings.max_length)
    size = job.settings.batch_size
    rows = [task.train[i] for i in range(min(len(task.train), size * CALIBRATION_BATCHES))]
    calibration = [task.collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    try:
        graft = fg.graft(task.model, job.recipe, calibration=calibration, seed=job.seed)
    except SiteError as error:
        return {**about, "unfit": str(error)}
    training = time.process_time()
    losses = _train(task, graft, job)
    training = time.process_time() - training
    heads = {id(p) for slot in graft.all_slots if not slot.delta.scalable for p in slot.parameters()}
    return {
        **about,
        "accuracy": accuracy(task),
        "trained": sum(p.numel() for p in graft.parameters() if id(p) not in heads),
        "lr": job.recipe.train.lr,
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
        "training_seconds": round(training, 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def _train(task: Given, graft: Graft, job: Job) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            graft.recipe.train,
            out=Path(folder),
            epochs=job.settings.epochs * EPOCHS[job.task],
            batch_size=job.settings.batch_size,
            seed=job.seed,
        )
        trainer = GraftTrainer(
            task.model,
            graft,
            arguments,
            train_dataset=task.train,
            collate=task.collate,
            lengths=task.lengths(task.train),
            cadence=_NoCheckpoints(),
        )
        trainer.remove_callback(ProgressReport)
        trainer.train()
    return trainer.losses


class _NoCheckpoints(Cadence):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
        """Nothing is saved: a run that is broken off starts again."""


def accuracy(task: Given) -> float:
    """Share of the test rows that the model labels right."""
    right, model = 0, task.model
    with inferring(model, "fp32", CPU):
        for batch in batches_of(task.test, task.collate, task.lengths(task.test), batch_size=64, device=CPU):
            labels = batch.pop("labels")
            right += int((_logits(model, batch).argmax(-1) == labels).sum())
    return right / len(task.test)


def _logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch).logits


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    settings = Settings(rows=options.rows, epochs=options.epochs)
    names = [name for name in entrants() if not options.only or name in (HEAD, *options.only)]
    tasks = options.tasks or TASKS
    jobs = [Job(name, task, seed, settings) for seed in range(options.seeds) for task in tasks for name in names]
    done = read_lines(options.lines)
    missing = [] if options.table else [job for job in jobs if job.key not in done]
    print(f"{sum(job.key in done for job in jobs)} of {len(jobs)} runs are done", flush=True)
    failures = _work(missing, options.lines, workers=options.workers, threads=options.threads)
    given_arguments = sys.argv[1:] if arguments is None else arguments
    options.out.write_text(page(read_lines(options.lines), settings, options.seeds, given_arguments))
    print(f"wrote {options.out}", flush=True)
    for name, reason in failures:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return int(bool(failures))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quality of the catalogue's module methods on four tasks.")
    known = entrants()
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=f"some of: {', '.join(known)}")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="some of the tasks")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each a process (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default 1)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of each method on each task (default {SEEDS})")
    parser.add_argument("--rows", type=int, default=Settings.rows, help="training examples (default %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="share of each task's passes (default %(default)s)")
    parser.add_argument("--lines", type=Path, default=LINES, metavar="FILE", help="where finished runs are kept")
    parser.add_argument("--out", type=Path, default=TABLE, metavar="FILE", help="where the table goes")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table of what is done")
    return parser.parse_args(arguments)


def _work(jobs: Sequence[Job], lines: Path, *, workers: int, threads: int) -> list[tuple[str, str]]:
    """Do the runs and note each as it ends; returns those that failed, with the reason."""
    failures: list[tuple[str, str]] = []
    began = time.monotonic()
    for count, (job, row, reason) in enumerate(_finished(jobs, workers, threads), 1):
        name = f"{job.method} on {job.task}, seed {job.seed}"
        left = (time.monotonic() - began) / count * (len(jobs) - count) / 60
        if row is None:
            failures.append((name, reason))
            print(f"{count}/{len(jobs)} {name}: FAILED: {reason}", flush=True)
            continue
        append(lines, row)
        found = f"accuracy {row['accuracy']:.3f}, {row['trained']:,} numbers" if "accuracy" in row else "does not fit"
        print(f"{count}/{len(jobs)} {name}: {found}; {left:.0f} min left", flush=True)
    return failures


def _finished(jobs: Sequence[Job], workers: int, threads: int) -> Iterator[tuple[Job, Row | None, str]]:
    if workers == 1 or not jobs:
        torch.set_num_threads(threads)
        for job in jobs:
            yield (job, *_attempt(job))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = {pool.submit(_attempt, job): job for job in jobs}
        for future in as_completed(futures):
            yield (futures[future], *future.result())


def _attempt(job: Job) -> tuple[Row | None, str]:
    # One method that fails must not cost the runs of the others
    try:
        return run(job), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def page(done: dict[str, Row], settings: Settings, seeds: int, arguments: Sequence[str]) -> str:
    """The whole document, made of finished runs."""
    jobs = {n: [Job(n, task, seed, settings) for task in TASKS for seed in range(seeds)] for n in entrants()}
    runs = {name: [done[job.key] for job in own if job.key in done] for name, own in jobs.items()}
    trained = {name: [row for row in rows if "accuracy" in row] for name, rows in runs.items()}
    missing = [f"{n} ({len(rows)} of {len(jobs[n])} runs)" for n, rows in runs.items() if len(rows) < len(jobs[n])]
    parts = [
        heading("Quality of adapters, prompts, side networks and hyper-networks", "modules_quality.py", arguments),
        _introduction(settings, seeds),
        _table(trained, runs),
        _verdict(trained),
        *([f"## Not finished\n\n{', '.join(missing)}"] if missing else []),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _introduction(settings: Settings, seeds: int) -> str:
    passes = ", ".join(f"{NAMES[task]} {settings.epochs * epochs:g}" for task, epochs in EPOCHS.items())
    return (
        f"Accuracy in percent, mean and standard deviation of {seeds} seeds (head, draws, order), at most "
        f"{settings.rows:,} training examples, batches of {settings.batch_size}; epochs: {passes}. SST-2 and TREC on "
        "MiniLM; digits of two new speakers and four new garments on transformers of 3 layers and width 64 that were "
        "trained on the others. Every method has its catalogue defaults, its rate among them. Numbers that train are "
        "those beside the head, on SST-2. A dash: no site of the model is fit for the method."
    )


def _table(trained: dict[str, list[Row]], runs: dict[str, list[Row]]) -> str:
    lines = []
    for name, rows in trained.items():
        if not runs[name]:
            continue
        numbers = next((f"{row['trained']:,}" for row in rows if row["task"] == TASKS[0]), "")
        rate = f"{methods[name].train.lr:g}"
        gain = _gain(trained, name)
        shown = "" if gain is None or name == HEAD else f"{100 * gain:+.1f}"
        lines.append([name, numbers, rate, *(_spread(runs[name], task) for task in TASKS), shown])
    head = ["", "numbers", "rate", *NAMES.values(), "of a head alone"]
    return table(head, lines)


def _spread(rows: Sequence[Row], task: str) -> str:
    found = [row for row in rows if row["task"] == task]
    values = [100 * row["accuracy"] for row in found if "accuracy" in row]
    if not values:
        return "-" if found else ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _gain(trained: dict[str, list[Row]], name: str) -> float | None:
    """Mean difference in accuracy to a head alone, run by run."""
    alone = {(row["task"], row["seed"]): row["accuracy"] for row in trained[HEAD]}
    gains = [r["accuracy"] - alone[r["task"], r["seed"]] for r in trained[name] if (r["task"], r["seed"]) in alone]
    return mean(gains) if gains else None


def _verdict(trained: dict[str, list[Row]]) -> str:
    gains = {n: gain for n in trained if n != HEAD and (gain := _gain(trained, n)) is not None}
    broken = [f"{name} ({100 * gain:+.1f})" for name, gain in gains.items() if gain < -BROKEN]
    said = (
        f"these are more than {100 * BROKEN:g} points below it: {', '.join(broken)}" if broken else "none is below it"
    )
    return f"Of {len(gains)} methods beside a head alone, on average over tasks and seeds, {said}."


if __name__ == "__main__":
    sys.exit(main())
