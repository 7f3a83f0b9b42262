"""A budget of ranks that grows while a graft trains."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from finegraft.control import sensitivity
from finegraft.control.processes import mean_over_processes
from finegraft.control.rank_budget import Decay, ranked
from finegraft.control.recurring import Recurring
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.grafting.moving import held
from finegraft.grafting.ranks import set_ranks
from finegraft.grafting.slot import Slot
from finegraft.locate.site import Site
from finegraft.quantised.stored import is_quantised
from finegraft.registry import controllers
from finegraft.select.statistics import measure


@controllers.register("rank-growth")
class RankGrowth(Recurring):
    """Now and then gives ranks to the sites that need them most, until there are as many as planned.

    Sites are compared by their changes' ``sensitivity``, the smoothed sum of ``|D * dL/dD| / sqrt(size of D)`` times
    its smoothed deviation (IncreLoRA, Zhang et al. 2023, arXiv:2308.12043), for which a backward pass more measures the
    whole gradient, site by site; or by the ``increase`` of ``|M|`` per growth since the last comparison, ``M`` the
    middle of ``three-factor`` (TriAdaptLoRA, Liang et al. 2025, arXiv:2501.08008).

    New ranks start as the kind draws them; the factor of a change follows from its new rank, as ``alpha / rank``.
    Survivors keep their optimizer state.

    Attributes:
        growth: ranks at the end, over all sites, as a multiple of those at the start.
        ranks: how many ranks a site is given at a time.
        score: what sites are compared by.
        pace: how many sites grow at a time: an ``even`` share of what is still to grow; or the share of training that
            has passed, times what is still to grow (``linear``), or as an exponent of it (``exponential``).
        reserve: ranks that are there before they are needed learn with ``m`` fixed at this small number (advance
            learning, 1e-5 in IncreLoRA); 0 makes new ranks when they are needed. It is for diagonal ``three-factor``.
        look: steps from one measuring of the sensitivity to the next.
        mean_decay: of the smoothed importance.
        spread_decay: of the smoothed deviation.
    """

    kind = "rank-growth"

    growth: Annotated[float, Field(gt=1)] = 2.0
    ranks: PositiveInt = 1
    score: Literal["sensitivity", "increase"] = "sensitivity"
    pace: Literal["even", "linear", "exponential"] = "even"
    reserve: NonNegativeFloat = 0.0
    look: PositiveInt = 1
    mean_decay: Decay = 0.85
    spread_decay: Decay = 0.85

    def start(self, run: Run) -> None:
        slots = self._slots(run)
        if not slots:
            raise RecipeError(
                f"control {self.kind!r} adds ranks to kinds of which all rank-wise tensors train, and by score "
                f"'increase', or with a reserve, to three-factor alone; recipe {run.graft.recipe.name!r} has none"
            )
        if self.score == "sensitivity":
            self._require_dense(run, slots)
        run.memory["active"] = {slot.key: slot.delta.rank for slot in slots}
        run.memory["target"] = round(self.growth * sum(run.memory["active"].values()))
        run.memory["growths"] = dict.fromkeys(run.memory["active"], 1)
        if self.score == "increase":
            run.memory["before"] = self._sizes(run, slots)
        for slot in slots if self.reserve else ():
            self._add_reserve(run, slot)

    def _require_dense(self, run: Run, slots: list[Slot]) -> None:
        sites = [run.graft.placement_of(slot).site for slot in slots]
        if quantised := [site.name for site in sites if is_quantised(site.parameter)]:
            raise RecipeError(
                f"control {self.kind!r} measures gradients of weights, and that of {quantised[0]!r} is quantised and "
                "has none: compare sites by another score (score: increase), or make the base dense (fg.dequantise)"
            )

    def after_backward(self, run: Run, batch: Any) -> None:
        if self.score != "sensitivity" or run.step % self.look or not self._left(run):
            return
        slots: dict[str, list[Slot]] = {}
        for slot in self._slots(run):
            slots.setdefault(slot.site, []).append(slot)

        def add(site: Site, gradient: Tensor) -> None:
            for slot in slots[site.name]:
                change = slot.delta.weight(slot, torch.zeros_like(gradient))
                found = (change * gradient).abs().sum() / math.sqrt(gradient.numel())
                run.memory[f"step/{slot.key}"] = run.memory.get(f"step/{slot.key}", 0.0) + found

        with held(run.graft):
            places = [run.graft.placement_of(own[0]).site for own in slots.values()]
            measure(run.graft.model, places, [batch], "signed", add)

    @torch.no_grad()
    def before_update(self, run: Run) -> None:
        for slot in self._slots(run):
            if (found := run.memory.pop(f"step/{slot.key}", None)) is not None:
                sensitivity.note(run, slot.key, mean_over_processes(found), self.mean_decay, self.spread_decay)
            if self.reserve and (grad := _middle(slot).grad) is not None:
                grad[..., run.memory["active"][slot.key] :] = 0.0

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        slots = self._slots(run)
        for slot in slots if self.reserve else ():
            self._hold_reserve(run, slot)
        if self.due(run) and self._left(run):
            self._grow(run, slots)

    def finish(self, run: Run) -> None:
        for slot in self._slots(run):
            self._drop_reserve(run, slot)

    def _slots(self, run: Run) -> list[Slot]:
        only = self.score == "increase" or self.reserve > 0
        if not only:
            return ranked(run)
        found = [slot for slot in run.graft.all_slots if slot.delta.kind == "three-factor"]
        return [slot for slot in found if not self.reserve or slot.delta.middle == "diagonal"]

    def _left(self, run: Run) -> int:
        """How many ranks are still to be given."""
        left: int = run.memory["target"] - sum(run.memory["active"].values())
        return max(0, left)

    def _grow(self, run: Run, slots: list[Slot]) -> None:
        order = self._scores(run, slots).argsort(descending=True, stable=True).tolist()
        candidates = [slots[number] for number in order if self._room(run, slots[number])]
        for slot in candidates[: self._count(run, len(slots))]:
            if given := min(self.ranks, self._left(run), self._room(run, slot)):
                active = run.memory["active"][slot.key] + given
                run.memory["active"] = {**run.memory["active"], slot.key: active}
                run.memory["growths"] = {**run.memory["growths"], slot.key: run.memory["growths"][slot.key] + 1}
                self._give(run, slot, active)
        if self.score == "increase":
            run.memory["before"] = self._sizes(run, slots)
        for slot in slots if self.reserve and not self._left(run) else ():
            self._drop_reserve(run, slot)

    def _room(self, run: Run, slot: Slot) -> int:
        """How many ranks more than it has a site can have."""
        rows, columns = run.graft.placement_of(slot).site.matrix_shape[-2:]
        room: int = min(rows, columns) - run.memory["active"][slot.key]
        return max(0, room)

    def _count(self, run: Run, sites: int) -> int:
        """How many sites grow in this round."""
        left, steps = self._left(run), self.steps(run.total_steps)
        if self.pace == "even":
            wanted = math.ceil(left / (sum(step >= run.step for step in steps) * self.ranks))
        else:
            passed = (run.step - steps[0]) / max(1, steps[-1] - steps[0])
            wanted = int(left * passed) if self.pace == "linear" else int(math.exp(passed * math.log(left)))
        return min(max(1, wanted), sites)

    def _scores(self, run: Run, slots: list[Slot]) -> Float[Tensor, " sites"]:
        if self.score == "increase":
            increase: Tensor = self._sizes(run, slots) - run.memory["before"].cpu()
            return increase
        found = [sensitivity.score(run, slot.key) for slot in slots]
        return torch.stack([torch.zeros(()) if score is None else score.cpu() for score in found])

    def _sizes(self, run: Run, slots: list[Slot]) -> Float[Tensor, " sites"]:
        sizes = [_middle(slot).detach().norm().cpu() / run.memory["growths"][slot.key] for slot in slots]
        return torch.stack(sizes)

    def _give(self, run: Run, slot: Slot, active: int) -> None:
        """Let a change have so many ranks, those of its reserve first."""
        there = min(active, slot.delta.rank)
        self._set(run, slot, there, active - there, same_scale=False)
        if self.reserve and self._left(run):
            self._add_reserve(run, slot)

    def _set(self, run: Run, slot: Slot, kept: int, added: int, *, same_scale: bool) -> None:
        ranks, rng = torch.arange(kept), run.rng(self.kind, slot.key, kept, added)
        set_ranks(run.graft, slot, ranks, added=added, rng=rng, same_scale=same_scale, optimizer=run.optimizer)

    def _add_reserve(self, run: Run, slot: Slot) -> None:
        self._set(run, slot, slot.delta.rank, self.ranks, same_scale=True)
        self._hold_reserve(run, slot)

    @torch.no_grad()
    def _hold_reserve(self, run: Run, slot: Slot) -> None:
        """Weights of reserved ranks stay what they are, as if they did not train."""
        active, middle = run.memory["active"][slot.key], _middle(slot)
        middle[..., active:] = self.reserve
        for value in run.optimizer.state.get(middle, {}).values():
            if isinstance(value, Tensor) and value.shape == middle.shape:
                value[..., active:] = 0.0

    def _drop_reserve(self, run: Run, slot: Slot) -> None:
        active = run.memory["active"][slot.key]
        if slot.delta.rank > active:
            self._set(run, slot, active, 0, same_scale=False)


def _middle(slot: Slot) -> nn.Parameter:
    found: nn.Parameter = slot.get_parameter("m")
    return found
