"""What training shows while it runs: a bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SECONDS_BETWEEN_LINES = 15.0
_SMOOTHING = 0.9


class ProgressReport(TrainerCallback):
    """Loss, samples per second and time left.

    Args:
        samples_per_step: samples that one optimizer step consumes, over all processes.
        console: where to show it; standard error by default. A bar is drawn when it is a
            terminal, else a line is printed at the start, every 15 s and at the end.
    """

    def __init__(self, *, samples_per_step: int, console: Console | None = None) -> None:
        self._samples_per_step = samples_per_step
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._loss: float | None = None

    def note_loss(self, loss: float) -> None:
        """Takes the loss of one step into the running mean that is shown."""
        self._loss = loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the training loop before the first step."""
        if not state.is_world_process_zero:
            return
        self._first_step, self._began = state.global_step, time.monotonic()
        self._last_line = float("-inf")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")
            self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the training loop after each optimizer step."""
        if not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, figures=self._figures(state))
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or state.global_step == state.max_steps:
            self._last_line = now
            left = self._seconds_left(state)
            self._print(f"step {state.global_step}/{state.max_steps}  {self._figures(state)}  {left:.0f} s left")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the training loop after each evaluation, with ``metrics=``."""
        if state.is_world_process_zero:
            metrics: dict[str, float] = kwargs["metrics"]
            shown = "  ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))
            self._print(f"step {state.global_step}: {shown}")

    def close(self) -> None:
        """Ends the bar; safe to call when none was drawn."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def _steps_per_second(self, state: TrainerState) -> float:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        return (state.global_step - self._first_step) / elapsed

    def _seconds_left(self, state: TrainerState) -> float:
        return (state.max_steps - state.global_step) / max(self._steps_per_second(state), 1e-9)

    def _figures(self, state: TrainerState) -> str:
        rate = self._steps_per_second(state) * self._samples_per_step
        loss = "" if self._loss is None else f"loss {self._loss:.4f}  "
        return f"{loss}{rate:.0f} samples/s"
