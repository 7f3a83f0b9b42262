"""Several low-rank changes, weighed for each sample.

MTLoRA, Agiza et al. 2024, arXiv:2403.20320; PETALface, Narayan et al. 2025, arXiv:2412.07771.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt, field_validator
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.deltas.task_rows import differs_by_sample
from finegraft.errors import RecipeError
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.low_rank_linear import add_low_rank
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("low-rank-mixture")
class LowRankMixture(Delta):
    """``W + s sum_e g_e B_e A_e`` with weights ``g`` that each sample has of its own.

    ``fg.weigh(graft, weights)`` says them for a batch. With names of ``tasks``, ``graft.task`` says for which task a
    batch or each of its samples is, at first the first: the weight of that task's change is one, others' zero. Without
    either all count alike, at one over their number; so they do when merged.

    Attributes:
        rank: inner width of each.
        experts: how many, or the names of their tasks.
        scale: the factor ``s``.
    """

    kind = "low-rank-mixture"
    on = ("linear",)

    rank: PositiveInt = 4
    experts: PositiveInt | tuple[str, ...] = 2
    scale: PositiveFloat = 1.0

    @field_validator("experts")
    @classmethod
    def _distinct(cls, experts: int | tuple[str, ...]) -> int | tuple[str, ...]:
        if isinstance(experts, tuple) and (not experts or len(set(experts)) < len(experts)):
            raise ValueError(f"give at least one name, and each once, not {list(experts)}")
        return experts

    @property
    def known_tasks(self) -> tuple[tuple[str, ...], ...]:
        return (self.experts,) if isinstance(self.experts, tuple) else ()

    @property
    def weighed(self) -> int:
        """How many weights a sample has."""
        return self.experts if isinstance(self.experts, int) else len(self.experts)

    def shapes(self, site: Site) -> Shapes:
        return {"a": (self.weighed, self.rank, site.fan_in), "b": (self.weighed, site.fan_out, self.rank)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"a": kaiming_uniform(self.shapes(site)["a"], rng)}

    def _of_batch(self, p: Any) -> Float[Tensor, " experts"]:
        """Weights that a whole batch has."""
        if isinstance(self.experts, int):
            return torch.full((self.weighed,), 1 / self.weighed, dtype=p.b.dtype, device=p.b.device)
        (task,) = p.task or (0,)
        return F.one_hot(torch.tensor(task, device=p.b.device), self.weighed).to(p.b.dtype)

    def _of_samples(self, p: Any) -> Float[Tensor, "samples experts"] | None:
        """Weights that each sample has; None where all have the same."""
        if p.sample_weights is not None:
            return p.sample_weights
        if not differs_by_sample(p.task):
            return None
        return F.one_hot(torch.tensor([task for (task,) in p.task]), self.weighed)

    def _joined(self, p: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
        b = self.scale * weights.to(p.b)[:, None, None] * p.b
        return p.a.flatten(0, 1), b.transpose(0, 1).flatten(1)

    def has_effect(self, p: Any, site: Site) -> bool:
        return bool((p.b @ p.a).any())

    def weight(self, p: Any, w: Tensor) -> Tensor:
        if self._of_samples(p) is not None:
            raise RecipeError(
                f"the samples of the batch differ in what kind {self.kind!r} does at {p.site!r}, which no one weight "
                "expresses, as merging and kinds above it that read the weight need: set one task for all, or leave "
                "the weigh block"
            )
        a, b = self._joined(p, self._of_batch(p))
        return w + (b @ a).to(w.dtype)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        y, weights = layer(x), self._of_samples(p)
        if weights is None:
            return add_low_rank(x, y, *self._joined(p, self._of_batch(p)), scale=1.0)
        samples = len(weights)
        if x.shape[0] % samples or (x.ndim > 2 and x.shape[0] != samples):
            raise RecipeError(
                f"weights are given for {samples} samples; {p.site!r} was given a batch of shape {tuple(x.shape)}"
            )
        a, b = self._joined(p, torch.ones(self.weighed))
        hidden = F.linear(x.to(y.dtype), a.to(y.dtype)).view(samples, -1, self.weighed, self.rank)
        hidden = hidden * weights.to(hidden)[:, None, :, None]
        return y + F.linear(hidden.reshape(*x.shape[:-1], -1), b.to(y.dtype))
