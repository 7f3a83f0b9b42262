"""How well structured methods train: SST-2 and TREC on MiniLM, 1,000 examples each, beside a head alone and PEFT's.

    python benchmarks/structured_quality.py --workers 2           # all runs, about two hours on two cores
    python benchmarks/structured_quality.py --only vera "PEFT vera"  # some of them; those that are done stay done
    python benchmarks/structured_quality.py --table               # only write the table of what is done

Every finished run is one line of ``results/structured_quality.jsonl``, known by a digest of its recipe, task, seed and
sizes: whatever did not change is never run twice, and the command can be stopped and given again at any time. The table
in ``results/structured_quality.md`` is made of these lines. Methods run with the settings and the rate that the
catalogue has for them; those that would train far more than the 337,920 numbers of rank 8 get a smaller rank. PEFT's
version of a method has the same settings and the same rate.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from contenders import Contender
from quality_comparison import Comparison, Runs
from quality_contenders import HEAD, Entrant, PeftChange
from quality_run import Settings
from quality_table import CERTAIN, NAMES, difference, signed, spread, unfinished
from shapes import MINILM
from structured_contenders import PAIRS
from tables import heading, table

SMALLER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hira": ({"rank": 8}, {"r": 8}),
    "loha": ({"rank": 4}, {"r": 4, "alpha": 4}),
    "hut": ({"rank": 4}, {}),
    "hydra": ({"rank": 4}, {}),
    "glora": ({"rank": 4}, {"r": 4}),
}
"""Settings, ours and PEFT's, of methods that train more by default."""


@dataclass(frozen=True, eq=False)
class PeftEntrant(Entrant):
    """PEFT's version of a method, trained as ours is.

    Attributes:
        contender: PEFT's configuration.
    """

    contender: Contender | None = None

    def wrapped(self, base: Any) -> PeftChange:
        assert self.contender is not None
        return PeftChange(self.contender.attach(base, MINILM), self.name, self.recipe.train)

    def data(self) -> dict[str, Any]:
        assert self.contender is not None
        settings = self.contender.settings
        given = settings if isinstance(settings, dict) else settings.__name__
        return {"peft": self.contender.method, "settings": given, "train": self.recipe.data().get("train")}


def entrants() -> Iterator[Entrant]:
    """A head alone, every structured method, and PEFT's version of it right after it."""
    yield HEAD
    for name, pair in PAIRS.items():
        ours, theirs = SMALLER.get(name, ({}, {}))
        yield Entrant(name, name, "ours", {**_settings(pair.ours), **ours})
        # PEFT's rates by tensor are those of an optimizer, not of the configuration
        if pair.theirs is not None and name != "lora+":
            yield PeftEntrant(pair.theirs.name, name, "peft", contender=_with(pair.theirs, theirs))


def _settings(contender: Contender) -> dict[str, Any]:
    assert isinstance(contender.settings, dict)
    return contender.settings


def _with(contender: Contender, changes: dict[str, Any]) -> Contender:
    return replace(contender, settings={**_settings(contender), **changes}) if changes else contender


def page(runs: Runs, untouched: dict[str, float], settings: Settings, seeds: int, arguments: Sequence[str]) -> str:
    """The whole document; see :class:`~quality_comparison.Comparison`."""
    finished = {entrant: rows for entrant, rows in runs.items() if rows}
    parts = [
        heading("Quality of structured fine-tuning", "structured_quality.py", arguments),
        _introduction(settings, seeds),
        _table(finished),
        "## Checks\n\n" + "\n".join(f"- {check}" for check in _checks(finished)),
        *unfinished(runs, seeds),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _introduction(settings: Settings, seeds: int) -> str:
    return (
        f"MiniLM (22.7 million numbers), {settings.rows} training examples of each task, {settings.epochs} epochs, "
        f"batches of {settings.batch_size}; accuracy in percent, mean and standard deviation of {seeds} seeds (head, "
        "draws, order). Each method runs at the rate that the catalogue has for it, and PEFT's version at the same. "
        "Numbers are those beside the new head."
    )


def _table(runs: Runs) -> str:
    head = ["", "numbers", "rate", *NAMES.values(), "of the head alone", "of PEFT's", "training, s"]
    lines = []
    for entrant, rows in runs.items():
        scores = [spread([row["accuracy"] for row in rows if row["task"] == task]) for task in NAMES]
        beside = [signed(difference(runs, entrant, HEAD, "accuracy")), signed(_beside_peft(runs, entrant))]
        counts = " to ".join(f"{number:,}" for number in sorted({row["trained"] for row in rows}))
        seconds = f"{mean(row['training_seconds'] for row in rows):.0f}"
        lines.append([entrant.name, counts, f"{rows[0]['lr']:g}", *scores, *beside, seconds])
    legend = (
        "*Of the head alone* and *of PEFT's*: mean difference in accuracy, run by run, with its standard error, in "
        "points. *Training*: mean processor seconds of a run."
    )
    return f"{table(head, lines)}\n\n{legend}"


def _beside_peft(runs: Runs, entrant: Entrant) -> tuple[float, float] | None:
    twin = next((e for e in runs if e.role == "peft" and e.method == entrant.name and entrant.role == "ours"), None)
    return None if twin is None else difference(runs, entrant, twin, "accuracy")


def _checks(runs: Runs) -> Iterator[str]:
    ours = [entrant for entrant in runs if entrant.role == "ours"]
    gains = {e.name: d for e in ours if (d := difference(runs, e, HEAD, "accuracy"))}
    broken = [name for name, (gain, _) in gains.items() if gain <= 0]
    yield f"No method's default is broken: {_found(broken, len(gains), 'are no better than a head alone')}"
    beside = {e.name: d for e in ours if (d := _beside_peft(runs, e))}
    worse = [name for name, (gain, error) in beside.items() if gain < -CERTAIN * error]
    what = f"are worse by more than {CERTAIN:g} standard errors"
    yield f"As good as PEFT's within the spread: {_found(worse, len(beside), what)}"


def _found(names: list[str], of: int, what: str) -> str:
    if not of:
        return "not run yet."
    listed = f": {', '.join(names)}" if names else ""
    return f"**{'missed' if names else 'met'}**. Of {of} methods {len(names)} {what}{listed}."


COMPARISON = Comparison("structured_quality", tuple(entrants()), 2, page)

if __name__ == "__main__":
    sys.exit(COMPARISON.main())
