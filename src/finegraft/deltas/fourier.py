"""A few frequencies of the change (FourierFT, Gao et al. 2024, arXiv:2405.03003)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor

from finegraft.deltas.additive import MATRICES
from finegraft.deltas.delta import Delta, Layer, Shapes, precise
from finegraft.deltas.rebuilding import rebuilding_weight
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("fourier")
class Fourier(Delta):
    """``W + s Re(IDFT(C))`` with ``C: (out, in)`` zero but for trained entries at places drawn from a seed.

    The places are those of every matrix of the same shape; they are drawn again on loading and are in no file.

    Attributes:
        frequencies: how many entries train, 8 or more, at most all.
        scale: the factor ``s``.
        seed: of the places.
        init_std: deviation of the entries at the start; 0 is exactly the identity.
    """

    kind = "fourier"
    on = MATRICES
    reads_weight: ClassVar[bool] = True

    frequencies: Annotated[int, Field(ge=8)] = 1000
    scale: PositiveFloat = 150.0
    seed: NonNegativeInt = 777
    init_std: NonNegativeFloat = 0.0

    @property
    def starts_as_identity(self) -> bool:
        return self.init_std == 0

    def shapes(self, site: Site) -> Shapes:
        return {"spectrum": (*site.batch, min(self.frequencies, site.fan_out * site.fan_in))}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"spectrum": self.init_std * torch.randn(self.shapes(site)["spectrum"], generator=rng)}

    def working(self, site: Site) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(self.seed)
        places = torch.randperm(site.fan_out * site.fan_in, generator=rng)[: self.frequencies]
        return {"places": places}

    def working_key(self, site: Site) -> Hashable:
        return site.fan_out * site.fan_in

    def weight(self, p: Any, w: Tensor) -> Tensor:
        entries = precise(p.spectrum)
        flat = entries.new_zeros(*p.spectrum.shape[:-1], w.shape[-2] * w.shape[-1])
        spectrum = flat.index_copy(-1, p.places, entries).view(w.shape)
        return w + (self.scale * torch.fft.ifft2(spectrum).real).to(w.dtype)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        return rebuilding_weight(self, p, layer, x)
