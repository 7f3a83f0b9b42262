"""The processes that train together, as Accelerate knows them."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Rank, number and device of this process, under ``accelerate launch``, ``torchrun`` or alone."""
    return PartialState(cpu=not torch.accelerator.is_available())
