"""Ctrl-C, or a request to terminate, during training: finish the step, save, and leave a run to resume."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finegraft.errors import FinegraftError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(FinegraftError):
    """Training stopped on request, with everything saved that resuming needs.

    Args:
        message: where the run stands and how to resume it.
        step: optimizer steps done.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class InterruptionCallback(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into "save and stop after this step"; the second one aborts at once.

    Signals reach the main thread only; trained elsewhere, they keep their usual meaning.

    Args:
        agree: makes one answer of those of all processes, which have to stop after the same step.
    """

    def __init__(self, agree: Callable[[bool], bool]) -> None:
        self.requested = False
        self._agree = agree

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block and restores their earlier handlers after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def stop_if_requested(self, control: TrainerControl) -> None:
        """Asks the training loop for a checkpoint and an end, if Ctrl-C was pressed."""
        self.requested = self._agree(self.requested)
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the training loop after each optimizer step."""
        self.stop_if_requested(control)
