"""What came of a run."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import nn

from finegraft import __version__
from finegraft.grafting import Graft
from finegraft.run.text import in_bytes, in_figures, in_time

_CURVE_POINTS = 400


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        out: its folder, with ``graft/``, ``metrics.json``, ``recipe.yaml``, ``config.yaml`` and ``report.html``.
        model: the base with the graft attached.
        graft: the trained graft.
        metrics: what ``metrics.json`` holds: ``headline`` (name of the main metric), ``higher_is_better``;
            ``before``, ``after`` and ``test`` (metrics by name); ``trainable_parameters``, ``parameters``,
            ``graft_bytes``, ``peak_memory_bytes``, ``training_seconds``, ``steps``; ``precision`` and
            ``precision_reason``; ``loss_curve`` (``[step, loss]``), ``evaluations`` and ``environment``.
    """

    out: Path
    model: nn.Module
    graft: Graft
    metrics: dict[str, Any]

    @property
    def score(self) -> float:
        """The headline metric after training."""
        return self.metrics["after"][self.metrics["headline"]]


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """The figures of a run: parameters, file, memory, time, and the score before and after."""
    table = Table(show_header=False)
    for name, value in summary_rows(metrics):
        table.add_row(name, value)
    return table


def summary_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the figures of a run, as text."""
    headline = metrics["headline"]
    share = metrics["trainable_parameters"] / metrics["parameters"]
    rows = [
        ("trainable parameters", f"{metrics['trainable_parameters']:,} of {metrics['parameters']:,} ({share:.2%})"),
        ("file", in_bytes(metrics["graft_bytes"])),
    ]
    rows += [(f"peak memory ({where})", in_bytes(peak)) for where, peak in metrics["peak_memory_bytes"].items()]
    rows += [
        ("time", f"{in_time(metrics['training_seconds'])} for {metrics['steps']:,} steps in {metrics['precision']}"),
        (f"{headline} before", in_figures(metrics["before"].get(headline))),
        (f"{headline} after", in_figures(metrics["after"].get(headline))),
    ]
    if metrics.get("test"):
        rows.append((f"{headline} on test", in_figures(metrics["test"].get(headline))))
    return rows


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware that a result was got with."""
    facts = {"finegraft": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    facts["python"] = platform.python_version()
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    return facts


def thinned(losses: Sequence[float]) -> list[tuple[int, float]]:
    """A curve of at most 400 points ``(step, mean loss of the steps up to it)``."""
    width = max(1, math.ceil(len(losses) / _CURVE_POINTS))
    groups = [losses[start : start + width] for start in range(0, len(losses), width)]
    ends = [min(start + width, len(losses)) for start in range(0, len(losses), width)]
    return [(end, sum(group) / len(group)) for end, group in zip(ends, groups, strict=True)]


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Metrics that JSON can hold: what is no number becomes None."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
