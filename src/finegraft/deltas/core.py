"""A small trained matrix between two frozen factors (LoRA-XS, Balazy et al. 2024, arXiv:2405.17604)."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Shapes
from finegraft.errors import SiteError
from finegraft.inits.decompose import check_decomposable, singular_triplets
from finegraft.inits.from_data import first_step
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("core")
class Core(Factored):
    """``W + s B R A``: ``R: (rank, rank)`` trains; ``A`` and ``B`` are frozen.

    They follow from the base or a seed and are in no file, unless calibration data gave them (LoRA-SB, Ponkshe et al.
    2024, arXiv:2411.19557): then the core starts with the singular values of the first step of Adam on the whole
    weight, and the factors, which the file holds, are its singular vectors.

    Attributes:
        rank: width of the core.
        alpha: ``s`` is ``alpha / rank``.
        factors_from: ``weight``, its leading singular triplets, the values in ``A``; or ``seed``, random orthonormal
            ones; or ``gradient`` of calibration batches, signs of which are the first step.
        step: size of that step in each entry, the learning rate of training the whole weight.
        exact: decompose a large weight whole, instead of approximating its leading triplets.
        seed: of the random ones.
        init_std: deviation of ``R`` at the start; 0 is exactly the identity. Not used with a gradient.
    """

    kind = "core"

    rank: PositiveInt = 16
    alpha: PositiveFloat = 16.0
    factors_from: Literal["weight", "seed", "gradient"] = "weight"
    step: PositiveFloat = 1e-4
    exact: bool = False
    seed: NonNegativeInt = 0
    init_std: NonNegativeFloat = 0.0

    @property
    def needs(self) -> Literal["covariance", "gradient"] | None:
        return "gradient" if self.factors_from == "gradient" else None

    @property
    def starts_as_identity(self) -> bool:
        return self.init_std == 0 and self.factors_from != "gradient"

    def fits(self, site: Site) -> None:
        super().fits(site)
        if self.rank > min(site.fan_in, site.fan_out):
            raise SiteError(
                f"a core of rank {self.rank} is larger than {site.name!r}, whose matrix is {site.fan_out} x "
                f"{site.fan_in}: use a rank of at most {min(site.fan_in, site.fan_out)}, or leave this site out"
            )
        if self.factors_from != "seed":
            check_decomposable(site)

    def shapes(self, site: Site) -> Shapes:
        return {"core": (*site.batch, self.rank, self.rank)}

    def constants(self, site: Site) -> Shapes:
        if self.factors_from != "gradient":
            return {}
        return {"a": (*site.batch, self.rank, site.fan_in), "b": (*site.batch, site.fan_out, self.rank)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        if self.factors_from == "gradient":
            u, s, vh = first_step(site, self.rank, self.step)
            return {"core": torch.diag_embed(s) * (self.rank / self.alpha), "a": vh.contiguous(), "b": u.contiguous()}
        return {"core": self.init_std * torch.randn(self.shapes(site)["core"], generator=rng)}

    def working(self, site: Site) -> dict[str, Tensor]:
        if self.factors_from == "gradient":
            return {}
        if self.factors_from == "weight":
            u, s, vh = singular_triplets(site, self.rank, exact=self.exact)
            return {"a": s.unsqueeze(-1) * vh, "b": u}
        rng = drawing(self.seed, site)
        a, b = (
            torch.linalg.qr(torch.randn(*site.batch, n, self.rank, generator=rng, dtype=torch.float64)).Q
            for n in (site.fan_in, site.fan_out)
        )
        return {"a": a.transpose(-1, -2).contiguous(), "b": b}

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        return {"core": (-2, -1), "a": (-2,), "b": (-1,)} if self.factors_from == "weight" else {}

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        return p.a, self.alpha / self.rank * (p.b @ p.core)


def drawing(seed: int, site: Site) -> torch.Generator:
    """Random numbers that follow from a seed and a site's name."""
    digest = hashlib.sha256(f"{seed}/{site.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
