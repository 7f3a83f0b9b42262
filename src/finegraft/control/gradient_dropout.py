"""Gradients are dropped at random where they disagree with what the untuned model says."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from finegraft.control.answers import answers, base_answers
from finegraft.control.controller import Controller
from finegraft.control.processes import mean_over_processes
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.registry import controllers

_TINY = 1e-8
_NO_LABEL = -100


@controllers.register("gradient-dropout")
class GradientDropout(Controller):
    """Each entry of the gradient ``ga`` is kept with probability ``(1 + sign(ga) (ga + gb) / (|ga| + |gb|)) / 2``.

    ``gb`` is the gradient of the cross-entropy to the soft answers of the teacher, which is the model with the graft's
    changes out of force; a new head stays as trained so far. ``gb`` only gates and is never added. A second forward and
    backward pass finds it, and a third forward the answers. From R-AMT (Zheng et al. 2023, arXiv:2307.15049).

    Attributes:
        share: 1 drops as said; less lets a part of each dropped entry through.
        tensors: only gradients of tensors with this name, such as ``scores``; None takes all beside those of heads.
    """

    kind = "gradient-dropout"

    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    tensors: str | None = None

    def start(self, run: Run) -> None:
        if not self._gated(run):
            raise RecipeError(f"control {self.kind!r}: nothing that trains beside heads is named {self.tensors!r}")

    def after_backward(self, run: Run, batch: Any) -> None:
        gated = {name: p for name, p in self._gated(run).items() if p.requires_grad}
        if not gated:
            return
        loss = distance_to_teacher(run, batch)
        found = torch.autograd.grad(loss, list(gated.values()), allow_unused=True)
        for name, grad in zip(gated, found, strict=True):
            if grad is not None:
                run.memory[name] = grad if name not in run.memory else run.memory[name] + grad

    def before_update(self, run: Run) -> None:
        rng = run.rng(self.kind)
        for name, parameter in self._gated(run).items():
            teacher = run.memory.pop(name, None)
            if parameter.grad is None or teacher is None:
                continue
            chance = chance_to_stay(parameter.grad, mean_over_processes(teacher))
            uniform = torch.rand(chance.shape, generator=rng).to(chance.device)
            parameter.grad.mul_(1 - self.share + self.share * (chance > uniform))

    def _gated(self, run: Run) -> dict[str, nn.Parameter]:
        heads = {id(p) for slot in run.graft.all_slots if not slot.delta.scalable for p in slot.parameters()}
        named = dict(run.graft.named_parameters())
        return {k: p for k, p in named.items() if id(p) not in heads and self.tensors in (None, k.rpartition("/")[2])}


def chance_to_stay(own: Float[Tensor, ...], teacher: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """Probability with which each entry of a gradient is kept, given the teacher's."""
    return (1 + own.sign() * (own + teacher) / (own.abs() + teacher.abs() + _TINY)) / 2


def distance_to_teacher(run: Run, batch: Any) -> Tensor:
    """Mean cross-entropy of the model's answers to a batch with those it gives without the graft, as soft labels."""
    kind = GradientDropout.kind
    soft = base_answers(run, batch, kind).softmax(-1)
    losses = -(soft * answers(run, batch, kind).log_softmax(-1)).sum(-1)
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == losses.shape and bool((labels == _NO_LABEL).any()):
        return losses[labels != _NO_LABEL].mean()
    return losses.mean()
