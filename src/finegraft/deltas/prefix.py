"""Trained keys and values before those of the input (prefix tuning, Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.adaption_prompt import by_head, prefix_scores
from finegraft.deltas.delta import Attend, Delta, Shapes
from finegraft.deltas.perceptron import mlp, mlp_initial, mlp_shapes
from finegraft.errors import SiteError
from finegraft.locate.roles import CROSS_SEGMENT
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("prefix")
class Prefix(Delta):
    """Attention over ``[P_k; K]`` and ``[P_v; V]``: every query sees the prefix, whatever the mask.

    The prefix comes after any rotation of keys by position and never enters a key-value cache, so that generation with
    and without a cache agrees. By default the tables train directly. With ``hidden`` they are ``W_2 tanh(W_1 P)`` while
    they train, ``P`` and ``W_1`` in common to the layers of a stack, and files hold the tables.

    Attributes:
        length: prefix positions; ``2 * length * width`` numbers at a site whose keys have that width over all heads.
        init_std: standard deviation of the tables (of ``P``, with ``hidden``) at the start, which is not the identity.
        hidden: width of the perceptron; None does without.
        residual_gate: whether scores ``s`` of the prefix become ``s + alpha tanh(tau s)``, with two trained numbers a
            site that start at 1 (NoRGa, Le et al. 2024, arXiv:2405.14124).
    """

    kind = "prefix"
    on = ("attention",)
    reads_weight: ClassVar[bool] = False

    length: PositiveInt = 10
    init_std: PositiveFloat = 0.02
    hidden: PositiveInt | None = None
    residual_gate: bool = False

    @property
    def starts_as_identity(self) -> bool:
        return False

    def folded(self) -> Delta:
        return self if self.hidden is None else self.model_copy(update={"hidden": None})

    def fits(self, site: Site) -> None:
        super().fits(site)
        if not site.shape:
            raise SiteError(f"the width of the keys of {site.name!r} could not be worked out, so no prefix fits it")

    def sharing(self, site: Site) -> dict[str, str]:
        if self.hidden is None:
            return {}
        stack = f"{site.stack} {'cross' if CROSS_SEGMENT.search(site.name) else 'self'} {site.fan_out}"
        return dict.fromkeys(("prefix", "layer_0", "bias_0"), stack)

    def shapes(self, site: Site) -> Shapes:
        gate: Shapes = {"alpha": (1,), "tau": (1,)} if self.residual_gate else {}
        table = (self.length, site.fan_out)
        if self.hidden is None:
            return {"keys": table, "values": table, **gate}
        return {"prefix": table, **mlp_shapes((site.fan_out, self.hidden, 2 * site.fan_out)), **gate}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        tables = [name for name in ("keys", "values", "prefix") if name in shapes]
        gate = {name: torch.ones(1) for name in ("alpha", "tau") if name in shapes}
        drawn = {name: torch.randn(shapes[name], generator=rng) * self.init_std for name in tables}
        return drawn | mlp_initial(shapes, rng) | gate

    def saved(self, p: Any, site: Site) -> dict[str, Tensor]:
        keys, values = self.tables(p)
        gate = {"alpha": p.alpha, "tau": p.tau} if self.residual_gate else {}
        return {"keys": keys.contiguous(), "values": values.contiguous(), **gate}

    def tables(self, p: Any) -> tuple[Float[Tensor, "length width"], Float[Tensor, "length width"]]:
        """Keys and values of the prefix."""
        if self.hidden is None:
            return p.keys, p.values
        keys, values = mlp(p, p.prefix, torch.tanh).chunk(2, dim=-1)
        return keys, values

    def has_effect(self, p: Any, site: Site) -> bool:
        return True

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
        keys, values = self.tables(p)
        if self.residual_gate:
            mask = torch.cat([self._gates(p, query, keys, key, settings), _added(mask, query, key)], dim=-1)
        elif mask is not None:
            mask = F.pad(mask, (self.length, 0), value=mask.dtype == torch.bool)
        if settings.get("position_bias") is not None:
            settings["position_bias"] = F.pad(settings["position_bias"], (self.length, 0))
        settings["is_causal"] = False
        return call(query, _before(keys, key), _before(values, value), mask, **settings)

    def _gates(self, p: Any, query: Tensor, keys: Tensor, key: Tensor, settings: dict[str, Any]) -> Tensor:
        """What the gate adds to the scores of the prefix."""
        scores = prefix_scores(query, by_head(keys, query, key.shape[1]), settings.get("scaling"))
        return p.alpha.to(scores.dtype) * torch.tanh(p.tau.to(scores.dtype) * scores)


def _added(mask: Tensor | None, query: Tensor, key: Tensor) -> Float[Tensor, "batch heads queries keys"]:
    """A mask as numbers to add to scores, for every head."""
    shape = (*query.shape[:3], key.shape[2])
    if mask is None:
        return query.new_zeros(shape)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return mask.to(query.dtype).expand(shape)


def _before(table: Tensor, states: Tensor) -> Tensor:
    batch, heads, _, width = states.shape
    prefix = table.to(states.dtype).reshape(-1, heads, width).transpose(0, 1)
    return torch.cat([prefix.expand(batch, -1, -1, -1), states], dim=2)
