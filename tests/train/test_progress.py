"""What is shown while training: a bar on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from finegraft.train import progress
from finegraft.train.progress import ProgressReport


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    """All that is printed for 100 steps of one second each, of 8 samples."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    target = io.StringIO()
    report = ProgressReport(
        samples_per_step=8, console=Console(file=target, force_terminal=terminal, width=100, force_interactive=terminal)
    )
    state, control = TrainerState(max_steps=100), TrainerControl()
    report.on_train_begin(None, state, control)
    for step in range(1, 101):
        now[0] += 1.0
        state.global_step = step
        report.note_loss(0.25)
        report.on_step_end(None, state, control)
    report.on_evaluate(None, state, control, metrics={"accuracy": 0.75})
    report.close()
    return target.getvalue()


def test_a_log_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, terminal=False).splitlines()
    assert lines[0] == "step 1/100  loss 0.2500  8 samples/s  99 s left"
    assert lines[-2:] == ["step 100/100  loss 0.2500  8 samples/s  0 s left", "step 100: accuracy 0.7500"]
    assert len(lines) == 9  # the first and the last step, every 15 s between, and the evaluation


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=True)
    for figure in ("step 100/100", "loss 0.2500", "8 samples/s", "left"):
        assert figure in text
