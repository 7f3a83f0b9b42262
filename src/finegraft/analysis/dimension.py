"""The intrinsic dimension of a task: how few random directions are enough to learn it.

Li et al. 2018 (arXiv:1804.08838) and Aghajanyan et al. 2021 (arXiv:2012.13255): d90 is the smallest dimension whose
score reaches 90% of what full fine-tuning gains over a baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from finegraft.analysis.bisection import check_grid, smallest_enough
from finegraft.analysis.repeated import FinishedRun, Tell, run_once
from finegraft.errors import RecipeError
from finegraft.grafting.make import resolve
from finegraft.report.chart import line_chart
from finegraft.report.figure import page
from finegraft.run.config import TuneConfig
from finegraft.run.config_file import as_config
from finegraft.run.folder import write_json, write_text
from finegraft.run.text import in_figures

METHOD = "intrinsic-dimension"
SHARE, START, FACTOR, RESOLUTION = 0.9, 16, 4.0, 1.25
_BASELINES = ("untrained", "head")


@dataclass(frozen=True)
class IntrinsicDimension:
    """What :func:`intrinsic_dimension` found.

    Attributes:
        out: folder with the runs, ``intrinsic-dimension.json`` and ``intrinsic-dimension.html``.
        dimension: the smallest that reaches the target; None if none does.
        facts: what the JSON holds: ``dimension``, ``below`` (the largest dimension tried that falls short),
            ``headline``, ``baseline``, ``full``, ``target``, ``share``, ``parameters`` (numbers that full fine-tuning
            trains) and ``points``: dimension, numbers that trained (heads among them), score, whether it reaches the
            target.
    """

    out: Path
    dimension: int | None
    facts: dict[str, Any]


def intrinsic_dimension(
    config: TuneConfig | Mapping[str, Any] | str | Path,
    *,
    share: float = SHARE,
    baseline: str | float = "untrained",
    start: int = START,
    factor: float = FACTOR,
    most: int | None = None,
    resolution: float = RESOLUTION,
    full_lr: float | None = None,
    tell: Tell | None = None,
) -> IntrinsicDimension:
    """Finds the smallest dimension in which a task is learned, by a grid of runs and bisection between two of them.

    Every run lies in a folder of its own under ``config.out`` and is trained once: interrupted and called again, the
    search goes on where it was and comes to the same result.

    Args:
        config: base, task, data, training settings, seed and folder. Its method is replaced by
            ``intrinsic-dimension`` without scales of the tensors, so that nothing but the dimension and a fresh head
            trains; unless it is that method already: then its settings are kept, all but ``dimension``.
        share: of the gain of full fine-tuning that has to be reached; default 0.9.
        baseline: what the gain is counted from: the score of the base with its fresh head, ``untrained`` (default);
            that after training the head alone, ``head``; or a number, such as that of always naming one class.
        start: first dimension to try; default 16.
        factor: from one dimension of the grid to the next; default 4.
        most: largest dimension to try; default as many as full fine-tuning trains.
        resolution: bisection ends when the smallest dimension that reaches the target and the largest below that
            does not differ by this ratio at most; default 1.25.
        full_lr: learning rate of full fine-tuning; by default that of method ``full``. ``train.lr`` of the
            configuration holds for the projected runs.
        tell: takes a line about each run.

    Raises:
        RecipeError: settings out of range, or full fine-tuning that gains nothing over the baseline.
        TrainingInterrupted: Ctrl-C; call again to continue.
    """
    config = as_config(config)
    _check(share, baseline)
    check_grid(start=start, factor=factor, most=most, resolution=resolution)
    runs = _Runs(config, _settings(config, start), full_lr, tell or (lambda line: None))
    full = runs.full()
    higher, (from_score, target) = full.metrics["higher_is_better"], runs.target(full, baseline, share)
    points: list[dict[str, Any]] = []

    def enough(dimension: int) -> bool:
        run = runs.projected(dimension, target)
        reaches = run.score >= target if higher else run.score <= target
        trained = run.metrics["trainable_parameters"]
        points.append({"dimension": dimension, "trained": trained, "score": run.score, "reaches": reaches})
        return reaches

    parameters = full.metrics["trainable_parameters"]
    found = smallest_enough(
        enough, start=start, factor=factor, most=parameters if most is None else most, resolution=resolution
    )
    facts = {
        "dimension": found.number,
        "below": found.below,
        "share": share,
        "headline": full.metrics["headline"],
        "higher_is_better": higher,
        "baseline": from_score,
        "full": full.score,
        "target": target,
        "parameters": parameters,
        "points": points,
    }
    out = Path(config.out)
    write_json(out / "intrinsic-dimension.json", facts)
    write_text(out / "intrinsic-dimension.html", _page(config, facts))
    return IntrinsicDimension(out, found.number, facts)


def _check(share: float, baseline: str | float) -> None:
    if not 0 < share <= 1:
        raise RecipeError(f"share is a part of the gain, above 0 and up to 1, not {share!r}")
    if isinstance(baseline, str) and baseline not in _BASELINES:
        raise RecipeError(f"baseline is a number or one of {', '.join(_BASELINES)}, not {baseline!r}")


def dimension_table(facts: Mapping[str, Any]) -> Table:
    """Every dimension that was tried, by size, with its score."""
    headline = facts["headline"]
    table = Table("dimension", headline, f"reaches {facts['target']:.4f}")
    for point in sorted(facts["points"], key=lambda point: point["dimension"]):
        table.add_row(f"{point['dimension']:,}", in_figures(point["score"]), "yes" if point["reaches"] else "no")
    table.add_section()
    table.add_row(f"full ({facts['parameters']:,})", in_figures(facts["full"]), "")
    table.add_row("baseline", in_figures(facts["baseline"]), "")
    return table


def conclusion(facts: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    what = f"{facts['share']:.0%} of full fine-tuning's gain in {facts['headline']}"
    if facts["dimension"] is None:
        return f"no dimension up to {facts['below']:,} reaches {what}"
    share = facts["dimension"] / facts["parameters"]
    return (
        f"{facts['dimension']:,} dimensions reach {what} ({share:.4%} of {facts['parameters']:,} parameters); "
        f"{facts['below']:,} do not"
    )


@dataclass(frozen=True)
class _Runs:
    """The runs of a search, by what they are for."""

    config: TuneConfig
    settings: dict[str, Any]
    full_lr: float | None
    tell: Tell

    def full(self) -> FinishedRun:
        return self._told("full fine-tuning", self._run("full", "full", self.full_lr))

    def target(self, full: FinishedRun, baseline: str | float, share: float) -> tuple[float, float]:
        """The score that the gain is counted from, and the one to reach."""
        start = self.baseline(baseline, full)
        if (full.score - start) * (1 if full.metrics["higher_is_better"] else -1) <= 0:
            raise RecipeError(
                f"full fine-tuning ({in_figures(full.score)}) is no better than the baseline ({in_figures(start)}): "
                "train longer, or set its learning rate"
            )
        return start, start + share * (full.score - start)

    def baseline(self, baseline: str | float, full: FinishedRun) -> float:
        if not isinstance(baseline, str):
            return baseline
        if baseline == "head":
            return self._told("head alone", self._run("head", "head", None)).score
        before = full.metrics["before"][full.metrics["headline"]]
        if before is None:
            raise RecipeError("the base's score is no number: give baseline= a number, or 'head'")
        return before

    def projected(self, dimension: int, target: float) -> FinishedRun:
        method = {**self.settings, "dimension": dimension}
        run = self._run(f"d-{dimension:09d}", method, self.config.train.lr)
        return self._told(f"{dimension:,} dimensions (target {in_figures(target)})", run)

    def _run(self, folder: str, method: Any, lr: float | None) -> FinishedRun:
        train = self.config.train.model_copy(update={"lr": lr})
        changes = {"method": method, "train": train, "out": str(Path(self.config.out) / folder)}
        return run_once(self.config.model_copy(update=changes))

    def _told(self, what: str, run: FinishedRun) -> FinishedRun:
        self.tell(f"{what}: {run.metrics['headline']} {in_figures(run.score)}")
        return run


def _settings(config: TuneConfig, start: int) -> dict[str, Any]:
    """The projected method without its dimension; that it exists and takes one is found out before any training."""
    method = config.method
    named = {"name": method} if isinstance(method, str) else dict(method)
    settings = named if named.get("name") == METHOD and "parts" not in named else {"name": METHOD, "scaled": False}
    settings.pop("dimension", None)
    resolve({**settings, "dimension": start})
    return settings


def _page(config: TuneConfig, facts: Mapping[str, Any]) -> str:
    points: Sequence[tuple[float, float]] = sorted((math.log10(p["dimension"]), p["score"]) for p in facts["points"])
    chart = line_chart(
        points,
        title=f"{facts['headline']} by dimension",
        x_label="log10 of the dimension",
        y_label=facts["headline"],
        markers=True,
    )
    lines = [
        conclusion(facts),
        f"full fine-tuning {in_figures(facts['full'])}, baseline {in_figures(facts['baseline'])}, "
        f"target {in_figures(facts['target'])}",
    ]
    return page(f"Intrinsic dimension: {Path(config.out).name} on {config.base}", [chart], text=lines)
