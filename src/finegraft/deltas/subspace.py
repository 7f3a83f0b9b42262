"""Low-rank factors within a frozen subspace of former ones (EigenLoRAx, Kaushik et al. 2025, arXiv:2502.04700)."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any

import torch
from jaxtyping import Float
from pydantic import PositiveInt, field_validator
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Shapes
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("subspace")
class Subspace(Factored):
    """``W + (C_b L_b) (L_a C_a)``: only the small loadings ``L_a: (rank, K)`` and ``L_b: (K, rank)`` train.

    The rows of ``C_a: (K, in)`` and the columns of ``C_b: (out, K)`` are orthonormal: the principal components of the
    factors that the given grafts have at the site, not centred, and random directions after them. They are in the
    file. ``L_a`` starts uniform within one half, ``L_b`` at zero.

    Attributes:
        rank: of the change.
        components: ``K``, at most the width; ``2 K rank`` numbers train at a site.
        grafts: folders of saved grafts of the same base, with low-rank changes at every site of the part; with none,
            all directions are random.
    """

    kind = "subspace"

    rank: PositiveInt = 8
    components: PositiveInt = 32
    grafts: tuple[str, ...] = ()

    @field_validator("grafts", mode="before")
    @classmethod
    def _as_names(cls, grafts: Any) -> Any:
        if isinstance(grafts, (str, PathLike)):
            grafts = [grafts]
        if not isinstance(grafts, (list, tuple)):
            raise ValueError(f"give a list of folders of saved grafts, not {grafts!r}")
        return [fspath(one) if isinstance(one, PathLike) else one for one in grafts]

    @field_validator("grafts")
    @classmethod
    def _each_once(cls, grafts: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(grafts)) < len(grafts):
            raise ValueError(f"give each folder once, not {list(grafts)}")
        return grafts

    @property
    def sources(self) -> tuple[str, ...]:
        return self.grafts

    def _components(self, width: int) -> int:
        return min(self.components, width)

    def shapes(self, site: Site) -> Shapes:
        return {
            "loadings_a": (*site.batch, self.rank, self._components(site.fan_in)),
            "loadings_b": (*site.batch, self._components(site.fan_out), self.rank),
        }

    def constants(self, site: Site) -> Shapes:
        return {
            "basis_a": (*site.batch, self._components(site.fan_in), site.fan_in),
            "basis_b": (*site.batch, site.fan_out, self._components(site.fan_out)),
        }

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        columns_a = [a.transpose(-1, -2) for a, _ in site.sources]
        columns_b = [b for _, b in site.sources]
        loadings = torch.empty(self.shapes(site)["loadings_a"]).uniform_(-0.5, 0.5, generator=rng)
        return {
            "loadings_a": loadings,
            "basis_a": self._frame(columns_a, (*site.batch, site.fan_in), rng).transpose(-1, -2).contiguous(),
            "basis_b": self._frame(columns_b, (*site.batch, site.fan_out), rng),
        }

    def _frame(
        self, columns: list[Float[Tensor, "*batch width rank"]], shape: tuple[int, ...], rng: torch.Generator
    ) -> Float[Tensor, "*batch width components"]:
        """The leading principal directions of the columns, filled up with random ones."""
        count = self._components(shape[-1])
        drawn = torch.randn(*shape, count, generator=rng, dtype=torch.float64)
        leading = []
        if columns:
            # Kept at their length, so that a direction of length zero leaves its place to a random one.
            u, s, _ = torch.linalg.svd(torch.cat([c.double().cpu() for c in columns], dim=-1), full_matrices=False)
            rank = int((s > s.amax(-1, keepdim=True) * 1e-6).sum(-1).min())
            leading = [u[..., : min(count, rank)]]
        return torch.linalg.qr(torch.cat([*leading, drawn], dim=-1)).Q[..., :count].float()

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        return p.loadings_a @ p.basis_a, p.basis_b @ p.loadings_b
