"""Penalties on a model's outputs against those of its base."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from finegraft.control.answers import answers, base_answers
from finegraft.control.controller import Controller
from finegraft.control.processes import mean_over_processes
from finegraft.control.run import Run
from finegraft.registry import controllers


@controllers.register("output-penalty")
class OutputPenalty(Controller):
    """Keeps outputs near the base's, diverse, and of few directions (BA-LoRA, Chang et al. 2024, arXiv:2408.04556).

    On logits of a sample: the mean squared distance of normalised logits from the base's; the mean square of the
    covariances between classes; minus the share of the first singular values of the batch's logits. On logits of
    tokens: the Kullback-Leibler divergence from the base's answers; minus the mean entropy; and the same share.

    It takes a forward and a backward pass more for each batch, and the base's forward pass: outputs are those after
    loss and dropout of its own. The gradients are added before the update, as the mean over a step's batches.

    Attributes:
        consistency: coefficient of the distance from the base.
        diversity: of the covariance, or the entropy.
        spectrum: of the share of the first singular values.
        values: how many these are.
    """

    kind = "output-penalty"

    consistency: NonNegativeFloat = 1e-4
    diversity: NonNegativeFloat = 3e-4
    spectrum: NonNegativeFloat = 1e-4
    values: PositiveInt = 3

    @model_validator(mode="after")
    def _does_something(self) -> OutputPenalty:
        if not (self.consistency or self.diversity or self.spectrum):
            raise ValueError("give at least one of consistency, diversity and spectrum")
        return self

    def after_backward(self, run: Run, batch: Any) -> None:
        own = {name: p for name, p in run.graft.named_parameters() if p.requires_grad}
        loss = self.loss(answers(run, batch, self.kind), base_answers(run, batch, self.kind))
        found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        run.memory["batches"] = run.memory.get("batches", 0) + 1
        for name, grad in zip(own, found, strict=True):
            if grad is not None:
                run.memory[name] = grad if name not in run.memory else run.memory[name] + grad

    def before_update(self, run: Run) -> None:
        batches = run.memory.pop("batches", 1)
        for name, parameter in run.graft.named_parameters():
            if (total := run.memory.pop(name, None)) is not None:
                _add(parameter, mean_over_processes(total) / batches)

    def loss(self, logits: Float[Tensor, "*rows classes"], base: Float[Tensor, "*rows classes"]) -> Float[Tensor, ""]:
        """The penalty for some logits, given the base's."""
        samples = logits.ndim == 2
        near = consistency(logits, base) if samples else divergence(logits, base)
        spread = redundancy(logits) if samples else -entropy(logits)
        return self.consistency * near + self.diversity * spread - self.spectrum * leading_share(logits, self.values)


def consistency(logits: Float[Tensor, "rows classes"], base: Float[Tensor, "rows classes"]) -> Float[Tensor, ""]:
    """Mean squared distance of normalised logits."""
    return F.mse_loss(F.normalize(logits, dim=-1), F.normalize(base, dim=-1))


def redundancy(logits: Float[Tensor, "rows classes"]) -> Float[Tensor, ""]:
    """Sum of squared covariances between different classes, divided by the number of classes."""
    rows, classes = logits.shape
    centred = logits - logits.mean(0)
    covariance = centred.t() @ centred / max(1, rows - 1)
    return (covariance - covariance.diag().diag()).square().sum() / classes


def divergence(logits: Float[Tensor, "*rows classes"], base: Float[Tensor, "*rows classes"]) -> Float[Tensor, ""]:
    """Kullback-Leibler divergence of the answers from the base's, summed over tokens, as the mean over samples."""
    return F.kl_div(logits.log_softmax(-1), base.log_softmax(-1), reduction="batchmean", log_target=True)


def entropy(logits: Float[Tensor, "*rows classes"]) -> Float[Tensor, ""]:
    """Mean entropy of the answers, in nats."""
    log = logits.log_softmax(-1)
    return -(log.exp() * log).sum(-1).mean()


def leading_share(logits: Float[Tensor, rows * rest], count: int) -> Float[Tensor, ""]:
    """The share of the first singular values in the sum of all, of logits as a matrix with a row for each sample."""
    values = torch.linalg.svdvals(logits.flatten(1))
    return values[:count].sum() / values.sum().clamp_min(torch.finfo(values.dtype).tiny)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
