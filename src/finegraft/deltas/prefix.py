"""Trained keys and values before those of the input (prefix tuning, Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.delta import Attend, Delta, Shapes
from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("prefix")
class Prefix(Delta):
    """Attention over ``[P_k; K]`` and ``[P_v; V]``: every query sees the prefix, whatever the mask.

    The prefix comes after any rotation of keys by position and never enters a key-value cache, so that generation with
    and without a cache agrees. The tables train directly, without the paper's perceptron.

    Attributes:
        length: prefix positions; ``2 * length * width`` numbers at a site whose keys have that width over all heads.
        init_std: standard deviation of the tables at the start, which is not the identity.
    """

    kind = "prefix"
    on = ("attention",)
    reads_weight: ClassVar[bool] = False

    length: PositiveInt = 10
    init_std: PositiveFloat = 0.02

    @property
    def starts_as_identity(self) -> bool:
        return False

    def fits(self, site: Site) -> None:
        super().fits(site)
        if not site.shape:
            raise SiteError(f"the width of the keys of {site.name!r} could not be worked out, so no prefix fits it")

    def shapes(self, site: Site) -> Shapes:
        return {"keys": (self.length, site.fan_out), "values": (self.length, site.fan_out)}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {n: torch.randn(shape, generator=rng) * self.init_std for n, shape in self.shapes(site).items()}

    def has_effect(self, p: Any, site: Site) -> bool:
        return bool(p.keys.any() or p.values.any())

    def attend(
        self,
        p: Any,
        call: Attend,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch kv_heads keys width"],
        value: Float[Tensor, "batch kv_heads keys width"],
        mask: Tensor | None,
        **settings: Any,
    ) -> Any:
        if mask is None and settings["is_causal"] and query.shape[2] > 1:
            seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            mask = seen.tril(key.shape[2] - query.shape[2])[None, None]
        if mask is not None:
            mask = F.pad(mask, (self.length, 0), value=mask.dtype == torch.bool)
        if settings.get("position_bias") is not None:
            settings["position_bias"] = F.pad(settings["position_bias"], (self.length, 0))
        settings["is_causal"] = False
        return call(query, _before(p.keys, key), _before(p.values, value), mask, **settings)


def _before(table: Tensor, states: Tensor) -> Tensor:
    batch, heads, _, width = states.shape
    prefix = table.to(states.dtype).view(-1, heads, width).transpose(0, 1)
    return torch.cat([prefix.expand(batch, -1, -1, -1), states], dim=2)
