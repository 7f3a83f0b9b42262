"""Low-rank factors pieced together from a pool of shards (MoS, Wang et al. 2024, arXiv:2410.00938)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.core import drawing
from finegraft.deltas.delta import Shapes
from finegraft.deltas.shared_low_rank import same_role
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds

_SIDES = ("a", "b")


@kinds.register("shard-pool")
class ShardPool(Factored):
    """``W + (alpha / rank) B A`` whose rows (columns) are strung together from shards of pools that sites share.

    Sites of one role and shape have a pool for ``A`` and another for ``B`` in common; which shards a site takes from
    either is random, follows from the seed and the site's name, and stays. Its first rows (columns) are its own. They
    train ``sites (pool_rank + private_rank) (in + out)`` numbers, whatever the rank. The pool and the site's own part
    of ``B`` start at zero.

    Attributes:
        rank: inner width.
        pool_rank: how many whole vectors the pool has for each of its sites.
        private_rank: how many rows (columns) are the site's own.
        shards: of a vector; where it does not divide the width, the largest number below that does.
        alpha: numerator of the scaling.
        seed: of the choice of shards.
    """

    kind = "shard-pool"

    rank: PositiveInt = 16
    pool_rank: NonNegativeInt = 3
    private_rank: NonNegativeInt = 1
    shards: PositiveInt = 4
    alpha: PositiveFloat = 16.0
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _has_a_use_for_the_pool(self) -> ShardPool:
        if self.private_rank > self.rank or (self.private_rank == self.rank) != (self.pool_rank == 0):
            raise ValueError(
                f"of {self.rank} ranks {self.private_rank} are private and the others come from a pool of "
                f"{self.pool_rank} a site: a pool has a use where not all are private, and only there"
            )
        return self

    def sharing(self, site: Site) -> dict[str, str]:
        return dict.fromkeys(("pool_a", "pool_b"), same_role(site)) if self.pool_rank else {}

    def shapes(self, site: Site) -> Shapes:
        own = {f"own_{side}": (*site.batch, self.private_rank, width) for side, width in self._widths(site)}
        sites = len([peer for peer in site.peers if same_role(peer) == same_role(site)]) or 1
        pools = {}
        for side, width in self._widths(site):
            n = self._shards(width)
            pools[f"pool_{side}"] = (*site.batch, sites * self.pool_rank * n, width // n)
        return (own if self.private_rank else {}) | (pools if self.pool_rank else {})

    def _widths(self, site: Site) -> list[tuple[str, int]]:
        return list(zip(_SIDES, (site.fan_in, site.fan_out), strict=True))

    def _shards(self, width: int) -> int:
        return max(n for n in range(1, self.shards + 1) if width % n == 0)

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        vectors = [(name, shapes[name]) for name in ("own_a", "pool_a") if name in shapes]
        return {
            name: kaiming_uniform((torch.Size(shape).numel() // site.fan_in, site.fan_in), rng).view(shape)
            for name, shape in vectors
        }

    def working(self, site: Site) -> dict[str, Tensor]:
        shapes, rng = self.shapes(site), drawing(self.seed, site)
        return {
            f"index_{side}": _taken(shapes[f"pool_{side}"][-2], (self.rank - self.private_rank, self._shards(n)), rng)
            for side, n in self._widths(site)
            if self.pool_rank
        }

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        a, b = (self._vectors(p, side) for side in _SIDES)
        return a, self.alpha / self.rank * b.transpose(-1, -2)

    def _vectors(self, p: Any, side: str) -> Float[Tensor, "*batch rank width"]:
        own = [getattr(p, f"own_{side}")] if self.private_rank else []
        if not self.pool_rank:
            return own[0]
        index = getattr(p, f"index_{side}")
        shards = getattr(p, f"pool_{side}").to(index.device).index_select(-2, index.flatten())
        return torch.cat([*own, shards.unflatten(-2, index.shape).flatten(-2)], dim=-2)


def _taken(count: int, shape: tuple[int, int], rng: torch.Generator) -> Int[Tensor, "rows shards"]:
    """Which of the shards are taken: none again before each was."""
    wanted = shape[0] * shape[1]
    rounds = [torch.randperm(count, generator=rng) for _ in range(-(-wanted // count))]
    return torch.cat(rounds)[:wanted].view(shape)
