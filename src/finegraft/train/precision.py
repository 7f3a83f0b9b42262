"""Whether to compute under bf16 autocast: where the processor has it and it is measurably faster."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finegraft.errors import RecipeError

_ROUNDS = 3
_GAIN = 0.9
_AGREEMENT = 0.05


@dataclass(frozen=True)
class Precision:
    """What to compute in, and why.

    Args:
        name: ``"fp32"`` or ``"bf16"``.
        reason: one sentence for the report.
        seconds: time of one forward and backward pass in each candidate, where it was measured.
    """

    name: str
    reason: str
    seconds: Mapping[str, float] | None = None


def autocast(name: str, device: torch.device) -> AbstractContextManager:
    """The context in which a model computes in precision ``name`` on ``device``.

    Raises:
        RecipeError: a name other than ``fp32`` and ``bf16``.
    """
    if name not in ("fp32", "bf16"):
        raise RecipeError(f"unknown precision {name!r}; use fp32, or bf16 for autocast")
    return torch.autocast(device.type, dtype=torch.bfloat16) if name == "bf16" else nullcontext()


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bf16 matrices natively, not by emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def choose_precision(model: nn.Module, batch: Mapping[str, Tensor], *, device: torch.device) -> Precision:
    """Chooses between fp32 and bf16 autocast by measuring the model itself.

    bf16 is chosen if all of these hold: the processor has bf16 instructions; the model's
    parameters are fp32; the fastest of 3 forward and backward passes under autocast takes at most
    0.9 of the time of the fastest of 3 without (measured in turns, after one unmeasured pass
    each); and the two losses differ by at most 5%. A model that is not fp32 stays as it is.
    Nothing else changes: gradients, buffers, training modes and random numbers are put back.

    Args:
        model: the grafted model, on ``device``.
        batch: one training batch, with labels, on ``device``.
        device: where both are.
    """
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        return Precision("fp32", "the base computes in its own half precision; autocast is not used")
    if not has_bf16(device):
        return Precision("fp32", "this processor has no bf16 instructions")
    seconds: dict[str, float] = {}
    losses: dict[str, float] = {}
    with _undisturbed(model, device):
        model.train()
        for turn in range(_ROUNDS + 1):
            for name in ("fp32", "bf16"):
                elapsed, losses[name] = _timed_pass(model, batch, name, device)
                if turn:
                    seconds[name] = min(elapsed, seconds.get(name, math.inf))
    ratio = seconds["bf16"] / seconds["fp32"]
    if not math.isclose(losses["bf16"], losses["fp32"], rel_tol=_AGREEMENT, abs_tol=_AGREEMENT):
        reason = f"the loss in bf16 ({losses['bf16']:.4g}) is not that in fp32 ({losses['fp32']:.4g})"
        return Precision("fp32", reason, seconds)
    reason = f"a pass under bf16 autocast takes {ratio:.2f} of the time in fp32 (chosen from {_GAIN} down)"
    return Precision("bf16" if ratio <= _GAIN else "fp32", reason, seconds)


def _timed_pass(model: nn.Module, batch: Mapping[str, Tensor], name: str, device: torch.device) -> tuple[float, float]:
    torch.manual_seed(0)
    began = time.perf_counter()
    with autocast(name, device):
        outputs = model(**batch)
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    loss.backward()
    value = float(loss.detach())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, value


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    gradients = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for module, training in modes.items():
            module.training = training
