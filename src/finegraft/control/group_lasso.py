"""A penalty under which whole groups of changes go to zero."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from finegraft.control.controller import Controller
from finegraft.control.penalties import sum_of
from finegraft.control.rank_budget import Share, ranked
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.grafting.moving import set_trainable
from finegraft.grafting.ranks import set_ranks
from finegraft.grafting.slot import Slot
from finegraft.registry import controllers


@controllers.register("group-lasso")
class GroupLasso(Controller):
    """``strength * sum_g |theta_g|`` over groups of what trains, Euclidean norms, not squared (GS-LoRA, Zhao et al.
    2024, arXiv:2403.11530). New heads do not count.

    Attributes:
        strength: its coefficient, once it has risen.
        group: all changes of a ``block``, of a ``site``, or each ``tensor``. What lies in no block is by sites.
        warmup: share of all steps in which it does not act.
        rise: share of all steps in which it then rises in proportion.
        by: the ``gradient`` of the penalty; or ``shrink``: after every step each group is shortened by
            ``strength`` times its learning rate, to exactly zero where it is shorter than that.
        drop_below: at the end groups with a norm of no more than this are set to zero; of those that consist of ranks
            all ranks are removed, so that they are in no file. The group of the largest norm stays. None drops none.
    """

    kind = "group-lasso"

    strength: PositiveFloat = 1e-4
    group: Literal["block", "site", "tensor"] = "block"
    warmup: Share = 0.1
    rise: Annotated[float, Field(ge=0, le=1)] = 0.0
    by: Literal["gradient", "shrink"] = "gradient"
    drop_below: NonNegativeFloat | None = None

    def strength_at(self, step: int, total_steps: int) -> float:
        """Its coefficient in the step after so many finished ones."""
        since = step - round(self.warmup * total_steps)
        rising = round(self.rise * total_steps)
        return self.strength * min(1.0, max(0.0, (since + 1) / (rising + 1)))

    def start(self, run: Run) -> None:
        if not self._groups(run):
            raise RecipeError(f"control {self.kind!r}: recipe {run.graft.recipe.name!r} trains nothing beside heads")

    def penalty(self, run: Run) -> Tensor | None:
        strength = self.strength_at(run.step, run.total_steps)
        if self.by == "shrink" or not strength:
            return None
        norms = [_norm(tensors) for tensors in self._groups(run).values() if any(t.requires_grad for t in tensors)]
        return strength * sum_of(norms) if norms else None

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        strength = self.strength_at(run.step - 1, run.total_steps)
        if self.by == "gradient" or not strength:
            return
        rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
        for tensors in self._groups(run).values():
            norm = _norm(tensors)
            for tensor in (t for t in tensors if t.requires_grad):
                tensor.mul_((1 - strength * rates[id(tensor)] / norm.to(tensor)).clamp_min(0) if norm else 1.0)

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        if self.drop_below is None:
            return
        groups = self._groups(run)
        norms = {name: float(_norm(tensors)) for name, tensors in groups.items()}
        dropped = {name for name, norm in norms.items() if norm <= self.drop_below} - {
            max(norms, key=lambda n: norms[n])
        }
        gone = {id(tensor) for name in dropped for tensor in groups[name]}
        for tensors in (groups[name] for name in dropped):
            for tensor in tensors:
                tensor.zero_()
        for slot in ranked(run):
            if any(id(tensor) in gone for tensor in slot.parameters()):
                set_ranks(run.graft, slot, torch.arange(0), optimizer=run.optimizer)
                set_trainable(run.graft, [slot], False, run.optimizer)

    def _groups(self, run: Run) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {}
        for placement in run.graft.placements:
            for slot in (slot for slot in placement.slots if slot.delta.scalable):
                for name, parameter in _own(slot).items():
                    place = placement.site.block if self.group == "block" and placement.site.block else slot.site
                    key = f"{slot.key}/{name}" if self.group == "tensor" else place
                    groups.setdefault(key, []).append(parameter)
        return groups


def _own(slot: Slot) -> dict[str, nn.Parameter]:
    return {name: p for name, p in slot.named_parameters() if name not in slot.borrowed}


def _norm(tensors: list[nn.Parameter]) -> Tensor:
    """The norm of all numbers of some tensors together, with gradient zero where all are zero."""
    total = sum_of([tensor.square().sum() for tensor in tensors])
    return torch.where(total > 0, total, torch.ones_like(total)).sqrt() * (total > 0)
