"""What a step of each structured method costs, and what attaching it does, beside PEFT's version of it.

    python benchmarks/structured_step.py                       # all pairs on all shapes, some hours on two cores
    python benchmarks/structured_step.py --only vera hra       # some of them; those that are done stay done
    python benchmarks/structured_step.py --quick --lines FILE  # tiny models: does it run?
    python benchmarks/structured_step.py --table --check       # write the table; exit status 1 where a target is missed

A method and PEFT's version take turns in one process with the same settings, as in ``step.py``; where PEFT has none, it
stands beside PEFT LoRA. A twin of the reference shows what the run can resolve. Peak memory is that of a process of its
own (``peak.py``). Last, every method is attached to a model of 1.2 billion numbers. Each of these is one line of
``results/structured_step.jsonl``, known by the methods, the shape and the way it was measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import finegraft as fg
from contenders import Contender, twin_of
from finegraft.grafting.make import resolve
from lines import append, digest, read_lines
from measure import Clock, take_turns
from peak import peak_of
from shapes import BERT_TINY, LLAMA, LLAMA_1B, LLAMA_TINY_BF16, MINILM, Shape
from structured_contenders import PAIRS, Pair
from tables import heading, table

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "structured_step.jsonl"
TABLE = RESULTS / "structured_step.md"
NOISE = 0.05
SLOWEST, MEDIAN = 1.05, 0.95  # of PEFT's
ATTACH, ATTACH_LORA = 20.0, 1.0  # seconds, to 1.2 billion numbers
WHOLE_SVD = ("pissa", "svft", "svft-banded", "svft-random", "svft-top")
"""Methods that take whole decompositions by their definition, or as PEFT's take them."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Which shapes are measured for steps, with how many rounds, and the one to attach to."""

    steps: tuple[tuple[Shape, int], ...]
    attach: Shape


WHOLE = Plan(steps=((MINILM, 9), (LLAMA, 5)), attach=LLAMA_1B)
QUICK = Plan(steps=((BERT_TINY, 1),), attach=LLAMA_TINY_BF16)


@dataclass(frozen=True)
class Task:
    """One line to be measured: a pair's steps on a shape, or a method's attaching where there are no rounds."""

    pair: Pair
    shape: Shape
    rounds: int
    processor_time: bool

    @property
    def key(self) -> str:
        ours, theirs = self.pair.ours, self.pair.reference
        recipe = resolve(ours.method, **ours.settings).data()
        facts = {key: value for key, value in recipe.items() if key not in ("note", "source", "train")}
        settings = theirs.settings if isinstance(theirs.settings, dict) else theirs.settings.__name__
        other = [theirs.name, theirs.method, settings] if self.rounds else None
        return digest([facts, other, self.shape.name, self.rounds, self.processor_time])


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    plan = QUICK if options.quick else WHOLE
    if options.processor_time:
        torch.set_num_threads(1)
    tasks = list(_tasks(plan, options))
    if not options.table:
        for failure in _work(tasks, options):
            print(f"failed: {failure}", file=sys.stderr)
    done = read_lines(options.lines)
    found = [done[task.key] for task in tasks if task.key in done]
    verdicts = list(_verdicts(found, options.only))
    given = sys.argv[1:] if arguments is None else arguments
    missing = [f"{t.pair.ours.name} on {t.shape.name}" for t in tasks if t.key not in done]
    page = _page(plan, found, verdicts, missing, heading("What structured methods cost", "structured_step.py", given))
    print(page)
    if options.out or not (options.quick or options.only):
        (options.out or TABLE).write_text(page)
    return int(options.check and bool(missing or not all(met for *_, met in verdicts)))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step, memory and attaching of structured methods, beside PEFT's.")
    parser.add_argument("--quick", action="store_true", help="tiny models and one round, to see that it runs")
    parser.add_argument("--rounds", type=int, help="rounds per shape instead of the defaults")
    parser.add_argument("--only", nargs="+", choices=sorted(PAIRS), metavar="NAME", help="only these methods")
    parser.add_argument("--again", action="store_true", help="measure what is done once more")
    parser.add_argument("--processor-time", action="store_true", help="time one computing thread, not the wall clock")
    parser.add_argument("--lines", type=Path, default=LINES, metavar="FILE", help="where measurements are kept")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"write the tables here; default, if whole: {TABLE}")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the tables of what is done")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    return parser.parse_args(arguments)


def _tasks(plan: Plan, options: argparse.Namespace) -> Iterator[Task]:
    pairs = [pair for name, pair in PAIRS.items() if not options.only or name in options.only]
    for shape, rounds in (*plan.steps, (plan.attach, 0)):
        for pair in pairs:
            yield Task(pair, shape, (options.rounds or rounds) if rounds else 0, options.processor_time)


def _work(tasks: list[Task], options: argparse.Namespace) -> list[str]:
    """Measure what is missing; returns what failed, with the reason."""
    clock = time.process_time if options.processor_time else time.perf_counter
    failures: list[str] = []
    base: Any = None
    for task in tasks:
        if task.key in read_lines(options.lines) and not options.again:
            continue
        name = f"{task.pair.ours.name} on {task.shape.name}"
        if not task.rounds:
            base = base or task.shape.build()
        # One method that fails must not cost the measurements of the others
        try:
            line = _steps(task, clock) if task.rounds else _attached(task.pair.ours, task.shape, base)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
            continue
        append(options.lines, {"key": task.key, "method": task.pair.ours.name, "shape": task.shape.name, **line})
        print(f"{name}: {_short(line)}", flush=True)
    return failures


def _steps(task: Task, clock: Clock) -> Line:
    pair, reference = task.pair, task.pair.reference
    for contender in (reference, pair.ours):
        contender.attach(BERT_TINY.build(), BERT_TINY)  # libraries and code paths load before the clock runs
    steps = take_turns([reference, pair.ours], task.shape, rounds=task.rounds, clock=clock, reference=reference)
    theirs, ours, twin = steps
    for step in (theirs, ours):
        step.memory = peak_of(task.shape.name, step.contender)["over_weights"]
    return {
        "peft": pair.theirs is not None,
        "ours": asdict(ours),
        "theirs": asdict(theirs),
        "noise": abs(twin.ratio - 1),
        "threads": torch.get_num_threads(),
    }


def _attached(contender: Contender, shape: Shape, base: Any) -> Line:
    began = time.perf_counter()
    contender.attach(base, shape)
    seconds = time.perf_counter() - began
    for graft in fg.grafts(base):
        graft.detach()
    return {"attach": seconds, "threads": torch.get_num_threads()}


def _short(line: Line) -> str:
    if "attach" in line:
        return f"attached in {line['attach']:.2f} s"
    return f"{line['ours']['ratio']:.3f} of {line['theirs']['contender']}, noise {line['noise']:.3f}"


def _page(plan: Plan, found: list[Line], verdicts: list[Any], missing: list[str], head: str) -> str:
    parts = [head.strip()]
    for shape, _ in plan.steps:
        lines = [line for line in found if line["shape"] == shape.name]
        parts += [f"## {shape.words}", _step_table(lines)] if lines else []
    attached = [line for line in found if "attach" in line]
    if attached:
        rows = [[line["method"], f"{line['attach']:.2f}"] for line in attached]
        parts += [f"## Attaching to {plan.attach.words}", table(["", "seconds"], rows)]
    rows = [
        [name, figure, f"{v:.3f}", f"{most:g}", "met" if met else "**missed**"]
        for name, figure, v, most, met in verdicts
    ]
    parts += ["## Targets", table(["", "figure", "measured", "at most", ""], rows)]
    parts += [f"Not measured: {', '.join(missing)}."] if missing else []
    return "\n\n".join(parts) + "\n"


def _step_table(lines: list[Line]) -> str:
    head = ["", "numbers trained", "step, ms", "beside", "numbers", "step, ms", "time of it (min-max)", "noise"]
    head += ["attach, s", "its attach, s", "peak over weights, MB", "its peak, MB", "peak of it"]
    rows = []
    for line in lines:
        ours, theirs = line["ours"], line["theirs"]
        spread = f"{ours['ratio']:.2f} ({ours['ratios'][0]:.2f}-{ours['ratios'][-1]:.2f})"
        row = [line["method"], f"{ours['trained']:,}", f"{ours['milliseconds']:.0f}", theirs["contender"]]
        row += [f"{theirs['trained']:,}", f"{theirs['milliseconds']:.0f}", spread, f"{line['noise']:.3f}"]
        row += [f"{ours['attach']:.2f}", f"{theirs['attach']:.2f}", f"{ours['memory'] / 1e6:.0f}"]
        rows.append([*row, f"{theirs['memory'] / 1e6:.0f}", f"{ours['memory'] / theirs['memory']:.2f}"])
    return table(head, rows)


def _verdicts(found: list[Line], only: list[str] | None) -> Iterator[tuple[str, str, float, float, bool]]:
    """``(method, figure, value, limit, met)``; of medians only where all methods are there."""
    beside_peft = [line for line in found if line.get("peft")]
    for shape in dict.fromkeys(line["shape"] for line in beside_peft):
        lines = [line for line in beside_peft if line["shape"] == shape]
        for figure, of in (("time", _time), ("peak", _peak)):
            values = {line["method"]: of(line) for line in lines}
            for name, value in values.items():
                yield name, f"{figure}, {shape}", value, SLOWEST, value <= SLOWEST
            if not only:
                middle = median(values.values())
                yield "the median", f"{figure}, {shape}", middle, MEDIAN, middle <= MEDIAN
        for line in lines:
            yield twin_of(_reference(line)).name, f"noise, {shape}", line["noise"], NOISE, line["noise"] <= NOISE
    for line in found:
        if "attach" in line and line["method"] not in WHOLE_SVD:
            most = ATTACH_LORA if line["method"] == "lora" else ATTACH
            yield line["method"], f"attach, {line['shape']}", line["attach"], most, line["attach"] <= most


def _reference(line: Line) -> Contender:
    return PAIRS[line["method"]].reference


def _time(line: Line) -> float:
    return line["ours"]["ratio"]


def _peak(line: Line) -> float:
    return line["ours"]["memory"] / line["theirs"]["memory"]


if __name__ == "__main__":
    sys.exit(main())
