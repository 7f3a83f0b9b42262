"""Lottery tickets: train everything, see what changed most, and train that alone from the start."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.control.controller import Controller
from finegraft.control.recurring import Share
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.grafting.moving import move, set_trainable
from finegraft.grafting.slot import Slot
from finegraft.registry import controllers
from finegraft.select import quota
from finegraft.select.choices import choices_of


@controllers.register("lottery")
class Lottery(Controller):
    """First every entry of the chosen sites trains; then the entries that changed most train alone, from the base
    again (LT-SFT, Ansell et al. 2022, arXiv:2110.07560).

    How many is the budget of each part's ``select``. On rewinding all
    changes go back to their start, those of new heads too, and the optimizer forgets everything.

    While everything trains, each entry takes 8 bytes for its place beside its value and the optimizer's state.

    Attributes:
        phase: share of all steps in which everything trains; in several rounds they share it.
        together: whether all sites of a part compete for what their budgets add up to, or each has its own.
        rounds: how often; each adds an equal part of the budget, and later ones do not choose what earlier ones did.
        dense_rate: learning rate of the chosen sites while everything trains, as a share of what they have later.
    """

    kind = "lottery"

    phase: Share = 0.5
    together: bool = True
    rounds: PositiveInt = 1
    dense_rate: PositiveFloat = 1.0

    def start(self, run: Run) -> None:
        slots = _slots(run)
        if not slots:
            raise RecipeError(f"{run.graft.recipe.name!r}: a lottery chooses entries, and no change has any")
        for slot in slots:
            if slot.delta.unit != "entry":
                raise RecipeError(f"a lottery chooses entries; {run.graft.recipe.name!r} selects by {slot.delta.unit}")
        for own_slots in _by_part(run).values():
            _budgets(run, own_slots)
        if run.total_steps <= self.rounds:
            raise RecipeError(f"a lottery of {self.rounds} rounds needs more steps than {run.total_steps}")
        own = {id(slot.values) for slot in slots}
        for name, parameter in run.graft.named_parameters():
            if id(parameter) not in own:
                run.memory[f"start/{name}"] = parameter.detach().clone()
        for slot in slots:
            run.memory[f"ticket/{slot.key}"] = slot.index[:0]
            move(run.graft, slot, _everything(run, slot), dropped="revert", optimizer=run.optimizer)

    def before_update(self, run: Run) -> None:
        if run.step < self._ends(run.total_steps)[-1]:
            for group in _groups(run):
                group["full_lr"], group["lr"] = group["lr"], group["lr"] * self.dense_rate

    def after_step(self, run: Run) -> None:
        for group in _groups(run):
            full = group.pop("full_lr", None)
            # Where a scheduler has set the next step's rate since, that one stays
            if full is not None and group["lr"] == full * self.dense_rate:
                group["lr"] = full
        ends = self._ends(run.total_steps)
        if run.step not in ends:
            return
        number = ends.index(run.step) + 1
        for slots in _by_part(run).values():
            self._draw(run, slots, number)
        self._rewind(run)
        for slot in _slots(run) if number == self.rounds else ():
            ticket = run.memory[f"ticket/{slot.key}"]
            move(
                run.graft,
                slot,
                ticket if len(ticket) else slot.index[:1],
                dropped="revert",
                optimizer=run.optimizer,
            )
            set_trainable(run.graft, [slot], len(ticket) > 0, run.optimizer)  # a site may win nothing

    def _ends(self, total: int) -> list[int]:
        """Steps after which a ticket is drawn."""
        last = min(max(round(self.phase * total), self.rounds), total - 1)
        return [last * (number + 1) // self.rounds for number in range(self.rounds)]

    def _draw(self, run: Run, slots: list[Slot], number: int) -> None:
        """Add the entries of one part that changed most to its tickets."""
        changes = []
        for slot in slots:
            change = slot.values.detach().abs().clone()
            change[run.memory[f"ticket/{slot.key}"]] = -1.0  # taken in an earlier round
            changes.append(change)
        budgets = _budgets(run, slots)
        if self.together or len(budgets) == 1:
            best = _best(torch.cat(changes), sum(budgets), number, self.rounds)
            ends = torch.tensor([len(change) for change in changes], device=best.device).cumsum(0)
            at = torch.bucketize(best, ends, right=True)
            found = [best[at == i] - (ends[i] - len(change)) for i, change in enumerate(changes)]
        else:
            found = [_best(c, b, number, self.rounds) for c, b in zip(changes, budgets, strict=True)]
        for slot, more in zip(slots, found, strict=True):
            key = f"ticket/{slot.key}"
            run.memory[key] = torch.cat([run.memory[key], more]).sort().values

    def _rewind(self, run: Run) -> None:
        own = dict(run.graft.named_parameters())
        with torch.no_grad():
            for name, parameter in own.items():
                if (start := run.memory.get(f"start/{name}")) is None:
                    parameter.zero_()
                else:
                    parameter.copy_(start)
        run.optimizer.state.clear()


def _best(change: Tensor, budget: int, number: int, rounds: int) -> Int[Tensor, " best"]:
    return change.topk(budget * number // rounds - budget * (number - 1) // rounds).indices


def _budgets(run: Run, slots: list[Slot]) -> list[int]:
    """Entries for all of these slots together, or for each."""
    select = run.graft.recipe.parts[slots[0].place[0]].select
    assert select is not None  # kinds that train chosen units have one
    choices = choices_of([run.graft.placement_of(slot).site for slot in slots], select)
    if select.parameters is not None or select.bytes is not None:
        return [quota.numbers(select, choices)]
    if select.scope == "model":
        return [quota.total(select, choices)]
    if select.scope == "row" or select.threshold is not None:
        raise RecipeError(
            "a lottery takes a budget for each site, or for all of a part; not for each row, nor a threshold"
        )
    return [quota.quota(select, choice) for choice in choices]


def _everything(run: Run, slot: Slot) -> Tensor:
    number = slot.delta.units(slot.index).number(run.graft.placement_of(slot).site.matrix_shape)
    return torch.arange(number, device=slot.index.device)


def _groups(run: Run) -> list[dict[str, Any]]:
    own = {id(slot.values) for slot in _slots(run)}
    return [group for group in run.optimizer.param_groups if own & {id(p) for p in group["params"]}]


def _slots(run: Run) -> list[Slot]:
    return [slot for slot in run.graft.all_slots if slot.delta.needs_selection]


def _by_part(run: Run) -> dict[int, list[Slot]]:
    found: dict[int, list[Slot]] = {}
    for slot in _slots(run):
        found.setdefault(slot.place[0], []).append(slot)
    return found
