"""The processes that train together, as Accelerate knows them."""

from __future__ import annotations

import torch
import torch.distributed
from accelerate import PartialState


def processes() -> PartialState:
    """Rank, number and device of this process, under ``accelerate launch``, ``torchrun`` or alone."""
    return PartialState(cpu=not torch.accelerator.is_available())


def end_processes() -> None:
    """Leave the group of processes in good order; left to the end of the interpreter, its threads may abort it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
