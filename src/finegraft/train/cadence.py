"""How often training evaluates, saves and logs, counted in optimizer steps."""

from __future__ import annotations

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Cadence(TrainerCallback):
    """Evaluates and saves every so many steps.

    The last step always saves, and never evaluates: whoever trains evaluates what came of it.

    Args:
        eval_every: steps between evaluations; 0 for none.
        checkpoint_every: steps between checkpoints; 0 for one at the end only.
        log_every: steps between messages to experiment trackers; 0 for none.
    """

    def __init__(self, *, eval_every: int = 0, checkpoint_every: int = 0, log_every: int = 0) -> None:
        self.eval_every, self.checkpoint_every, self.log_every = eval_every, checkpoint_every, log_every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the training loop after each optimizer step."""
        last = state.global_step >= state.max_steps
        control.should_evaluate = not last and _due(state.global_step, self.eval_every)
        control.should_save = last or _due(state.global_step, self.checkpoint_every)
        control.should_log = _due(state.global_step, self.log_every)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
