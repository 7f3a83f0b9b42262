"""The table of the comparison of selective methods, and which published claims show in it: computed, not judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from quality_contenders import FULL, LORA, RANDOM, Entrant
from quality_run import OTHER, Settings
from tables import heading, table

NAMES = {"sst2": "SST-2", "trec": "TREC"}
CERTAIN = 2.0  # standard errors by which a mean difference must stray from zero
Row = dict[str, Any]
Runs = dict[Entrant, list[Row]]


def page(runs: Runs, untouched: dict[str, float], settings: Settings, seeds: int, arguments: Sequence[str]) -> str:
    """The whole document.

    Args:
        runs: finished runs of every entrant; those without any are named as missing.
        untouched: the probe's accuracy on each task with the features of the untouched base.
        settings: of the runs.
        seeds: how many runs of each entrant on each task there should be.
        arguments: of the command line.
    """
    finished = {entrant: rows for entrant, rows in runs.items() if rows}
    parts = [
        heading("Quality of selective fine-tuning", "selective_quality.py", arguments),
        _introduction(settings, seeds, untouched),
        _table(finished),
        "## Claims\n\n" + "\n".join(f"- {claim}" for claim in _claims(finished)),
    ]
    parts += unfinished(runs, seeds)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def unfinished(runs: Runs, seeds: int) -> list[str]:
    """A paragraph that names the entrants whose runs are not all done."""
    wanted = len(NAMES) * seeds
    names = [f"{e.name} ({len(rows)} of {wanted} runs)" for e, rows in runs.items() if len(rows) < wanted]
    return [f"## Not finished\n\n{', '.join(names)}"] if names else []


def _introduction(settings: Settings, seeds: int, untouched: dict[str, float]) -> str:
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in asdict(settings).items())
    probes = ", ".join(f"{percent(value)} on {NAMES[task]}" for task, value in untouched.items())
    return (
        f"MiniLM (22.7 million numbers); {facts}; mean and standard deviation of {seeds} seeds (head, draws, order) "
        "in percent. Each method runs at the rate that the catalogue has for it. Methods with a budget train about "
        f"{settings.share:.1%} of the base's numbers; where the method's nature fixes what trains, the count says how "
        "many (for methods that sample what trains, all that may). Numbers are those beside the new head.\n\n"
        "*Other task* is what tuning left of the base: accuracy on the other data set of a ridge classifier over the "
        f"frozen features (mean of the last hidden states). The untouched base has {probes}."
    )


def _table(runs: Runs) -> str:
    head = ["", "selection", "numbers", "rate", *(f"{name}" for name in NAMES.values())]
    head += [f"after {NAMES[task]}: {NAMES[OTHER[task]]}" for task in NAMES]
    head += ["of apet", "training, s"]
    lines = []
    for entrant, rows in runs.items():
        numbers = sorted({row["trained"] for row in rows})
        counts = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"
        scores = [spread([r["accuracy"] for r in rows if r["task"] == task]) for task in NAMES]
        probes = [spread([r["probe"] for r in rows if r["task"] == task]) for task in NAMES]
        beside = difference(runs, entrant, RANDOM, "accuracy")
        seconds = f"{mean(r['training_seconds'] for r in rows):.0f}"
        lines.append(
            [entrant.name, entrant.role, counts, f"{rows[0]['lr']:g}", *scores, *probes, signed(beside), seconds]
        )
    legend = (
        "*Of apet*: mean difference in accuracy to random entries, run by run, with its standard error. *Training*: "
        "mean processor seconds of a run."
    )
    return f"{table(head, lines)}\n\n{legend}"


def _claims(runs: Runs) -> list[str]:
    informed = [e for e in runs if e.role == "informed"]
    chosen = [e for e in runs if e.role in ("informed", "random")]
    return [
        _tally("Informed selection beats random entries (apet)", runs, informed, RANDOM, "accuracy"),
        _tally("Chosen parts at this budget beat PEFT LoRA of as many numbers", runs, chosen, LORA, "accuracy"),
        _tally("Chosen parts at this budget beat full fine-tuning", runs, chosen, FULL, "accuracy"),
        _tally("Sparse tuning forgets less than full fine-tuning", runs, chosen, FULL, "probe"),
        _tally("Sparse tuning forgets less than PEFT LoRA of as many numbers", runs, chosen, LORA, "probe"),
        _half(runs),
    ]


def _tally(claim: str, runs: Runs, entrants: Sequence[Entrant], reference: Entrant, figure: str) -> str:
    """How many of the entrants are better, worse or no different, and whether the claim shows."""
    found = {e: d for e in entrants if e is not reference and (d := difference(runs, e, reference, figure))}
    if not found:
        return f"{claim}: not run yet."
    better = [e.name for e, (gain, error) in found.items() if gain > CERTAIN * error]
    worse = [e.name for e, (gain, error) in found.items() if gain < -CERTAIN * error]
    average = mean(gain for gain, _ in found.values())
    shows = len(better) > len(found) / 2
    verdict = "shows" if shows else "does not show at this scale"
    names = f" ({', '.join(better)})" if better else ""
    worse_names = f" ({', '.join(worse)})" if worse else ""
    return (
        f"{claim}: **{verdict}**. Of {len(found)} methods {len(better)} are better by more than {CERTAIN:g} standard "
        f"errors{names}, {len(worse)} worse{worse_names}; on average {100 * average:+.1f} points."
    )


def _half(runs: Runs) -> str:
    entrants = [e for e in runs if e.name in ("hft", "lisa", "freeze-lower")]
    return _tally("Training a part of the layers at a time forgets less than all", runs, entrants, FULL, "probe")


def difference(runs: Runs, entrant: Entrant, reference: Entrant, figure: str) -> tuple[float, float] | None:
    """Mean difference over runs of the same task and seed, and its standard error; None with fewer than two."""
    theirs = {(r["task"], r["seed"]): r[figure] for r in runs.get(reference, ())}
    pairs = [(r["task"], r["seed"], r[figure]) for r in runs.get(entrant, ())]
    gains = [value - theirs[task, seed] for task, seed, value in pairs if (task, seed) in theirs]
    if entrant is reference or len(gains) < 2:
        return None
    return mean(gains), stdev(gains) / math.sqrt(len(gains))


def signed(gain: tuple[float, float] | None) -> str:
    """A mean difference and its standard error in points."""
    return "" if gain is None else f"{100 * gain[0]:+.1f} ± {100 * gain[1]:.1f}"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation in percent."""
    if not values:
        return ""
    return percent(mean(values)) + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"
