"""A random part of the blocks, or of the matrices in every block, trains at a time."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Int
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from finegraft.control.blocks import by_block, draw, in_blocks, slots_of, train_only
from finegraft.control.controller import Controller
from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.grafting import Graft
from finegraft.locate.roles import ROLES
from finegraft.recipe import Select
from finegraft.registry import controllers, nearest
from finegraft.select.whole_sites import choose_sites


@controllers.register("sample-blocks")
class SampleBlocks(Controller):
    """Draws anew, at set steps, which blocks train; the others are frozen meanwhile (LISA, Pan et al. 2024,
    arXiv:2403.17919), or which matrices of each block do (HFT, Hui et al. 2024, arXiv:2404.18466).

    What is frozen keeps its values, and has no gradient and no optimizer state. What lies outside of blocks (token
    embeddings, the last norm, heads) always trains.

    Attributes:
        unit: ``block``, or ``matrix``: within each block, a share of the sites of its attention, of its FFN and of any
            other role. Shares that are no whole number are made up over the blocks: of three matrices half is one,
            two, one, two ...
        count: number of blocks that train at a time; all of them where there are fewer. Give this or ``share``.
        share: share of the blocks, rounded down but at least one, or of the matrices.
        every: steps from one draw to the next. Give this or ``rounds``.
        rounds: draws over the whole training, after equal shares of it.
        importance: relative probability of each block from first to last; None makes them equal.
        always: roles that train always, also inside of blocks.
    """

    kind = "sample-blocks"
    freezes_sites = True

    unit: Literal["block", "matrix"] = "block"
    count: PositiveInt | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    every: PositiveInt | None = None
    rounds: PositiveInt | None = None
    importance: tuple[PositiveFloat, ...] | None = None
    always: tuple[str, ...] = ("embed", "lm_head", "head")

    @model_validator(mode="after")
    def _fits(self) -> SampleBlocks:
        for one, other in (("count", "share"), ("every", "rounds")):
            if (getattr(self, one) is None) is (getattr(self, other) is None):
                raise ValueError(f"give exactly one of {one} and {other}")
        if self.unit == "matrix" and (self.share is None or self.importance is not None):
            raise ValueError("unit 'matrix' takes a share of each block's matrices, not count or importance")
        if strange := [role for role in self.always if role not in ROLES]:
            raise ValueError(f"always has the unknown role {strange[0]!r}; {nearest(strange[0], list(ROLES))}")
        return self

    def before_step(self, run: Run) -> None:
        if self._due(run):
            run.memory["active"] = self._drawn(run)
        units = self._units(run.graft)
        chosen = [slot for i in run.memory["active"].tolist() for slot in units[i]]
        train_only(run, chosen, [slot for unit in units for slot in unit])

    def finish(self, run: Run) -> None:
        everything = slots_of(in_blocks(run.graft, self.always))
        train_only(run, everything, everything)

    def _due(self, run: Run) -> bool:
        if run.step == 0 or "active" not in run.memory:
            return True
        if self.every is not None:
            return run.step % self.every == 0
        rounds = self.rounds or 1
        return run.step * rounds // run.total_steps != (run.step - 1) * rounds // run.total_steps

    def _units(self, graft: Graft) -> list[list]:
        """Changes by what is drawn: block by block, or site by site."""
        if self.unit == "block":
            return [slots_of(placements) for placements in by_block(graft, self.always).values()]
        return [list(placement.slots) for placement in in_blocks(graft, self.always)]

    def _drawn(self, run: Run) -> Int[Tensor, " active"]:
        rng = run.rng(self.kind)
        if self.unit == "matrix":
            sites = [placement.site for placement in in_blocks(run.graft, self.always)]
            chosen = {site.name for site in choose_sites(sites, Select(unit="module", density=self.share), rng)}
            return torch.tensor([i for i, site in enumerate(sites) if site.name in chosen])
        blocks = len(by_block(run.graft, self.always))
        if self.importance is not None and len(self.importance) != blocks:
            raise RecipeError(
                f"control {self.kind!r}: importance gives {len(self.importance)} numbers for {blocks} blocks"
            )
        count = max(1, int((self.share or 0) * blocks)) if self.count is None else min(self.count, blocks)
        return draw(torch.tensor(self.importance or (1.0,) * blocks), count, rng)
