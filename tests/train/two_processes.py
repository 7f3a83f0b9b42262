"""Run by ``torchrun`` in two processes: Ctrl-C reaches one of them, and the resumed training equals a whole one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from finegraft.train.interruption import TrainingInterrupted
from finegraft.train.processes import end_processes
from tests.train.test_trainer import AtStep, press_ctrl_c, trainer_in


def main(folder: Path) -> None:
    """Prints ``the same bits`` once for each process."""
    whole = trainer_in(folder / "whole")
    whole.train()
    callbacks = [AtStep(4, press_ctrl_c)] if whole.args.process_index == 1 else []
    with pytest.raises(TrainingInterrupted, match="after step 4 of 9"):
        trainer_in(folder / "parts", callbacks=callbacks).train()
    resumed = trainer_in(folder / "parts")
    resumed.train(folder / "parts" / "checkpoint-4")
    first, second = whole.graft.state(), resumed.graft.state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.losses == resumed.losses
    assert (len(whole.losses), whole.args.world_size) == (9, 2)
    print("the same bits", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_processes()
    os._exit(0)  # gloo's threads may abort an interpreter that ends in the ordinary way
