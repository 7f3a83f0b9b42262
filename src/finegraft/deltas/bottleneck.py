"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; He et al. 2022, arXiv:2110.04366)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor

from finegraft.deltas import token_mixing
from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.deltas.experts import Join, check_experts, chosen, owners, stacked_initial, stacked_shapes
from finegraft.deltas.projections import (
    RULES,
    Binary,
    Dense,
    Get,
    Kronecker,
    Projection,
    Start,
    TensorTrain,
    from_bits,
    to_bits,
)
from finegraft.deltas.token_mixing import Convolution, Routing
from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.registry import kinds

Share = Annotated[float, Field(ge=0, lt=1)]


@kinds.register("bottleneck")
class Bottleneck(Delta):
    """``layer(x) + s * up(act(down(z)))`` with ``z = layer(x)`` (serial) or ``z = x`` (parallel).

    On a sublayer (roles ``attn``, ``ffn``) ``x`` is the sublayer's input, and the sum happens before the residual.
    Convolutions and routing functions let tokens see each other, later ones too: they are not for causal models.

    Attributes:
        width: the bottleneck ``r``; ``2 d r + r + d`` numbers at a site of width ``d``, with dense projections.
        placement: ``serial`` or ``parallel``.
        activation: between the two maps; ``glu`` takes a ``down`` of twice the width.
        scale: the factor ``s``.
        init: ``lora`` (up is zero: exactly the identity), ``houlsby`` (normal 0.01, cut at two deviations) or ``bert``
            (normal 0.02): near the identity.
        dropout: after the activation, in training.
        norm: whether the input goes through a layer normalisation of the adapter's own.
        norm_after: whether the change does; its gain starts at zero, which is the identity, and ``up`` not.
        projection: ``dense``, ``kronecker`` (PHM layers), ``tensor-train`` or ``binary`` (one bit an entry,
            and a size).
        terms: ``n`` of ``kronecker``: ``2 q (d + r) + r + d`` numbers at a site, and ``n^3`` that all sites share.
        projection_rank: ``q`` of ``kronecker``, and the inner widths of a ``tensor-train``.
        down: whether the first map trains at each site, is ``shared`` by all sites of the part (of one width), or stays
            as it is drawn (``frozen``).
        convolution: between activation and ``up``, over the tokens: ``depthwise``; ``conformer``, the same with a
            normalisation and SiLU after it; or ``branches`` of reach 1, 3 and 5 that see each other (DETRIS).
        kernel: length of the depthwise kernels along each axis, odd.
        grid: how the tokens lie, such as ``[14, 14]``; None is one line. Convolutions have a grid of their own.
        front: number of tokens before the grid (class tokens), of the other modality's tokens for ``routing``, and of
            those meant by ``tokens``.
        tokens: which tokens take the change.
        routing: how the bottleneck's input meets the other modality's tokens.
        gate: a trained factor on the change: ``1 + g`` for the site or each channel, or ``sigmoid(z w + b)`` for each
            token, or of its mean for each sample.
        skip: share of passes in training that leave the change out at a site; others scale it by ``1 / (1 - skip)``.
        experts: number of ``up`` maps, one of them drawn for each pass in training.
        join: how experts are one in evaluation: the ``mean`` of their tensors, or the ``union`` of what each owns, a
            random part of the entries of one map (MoSA).
    """

    kind = "bottleneck"
    on = ("linear", "conv", "embedding", "norm", "sublayer", "block", "network")
    reads_weight: ClassVar[bool] = False

    width: PositiveInt = 16
    placement: Literal["serial", "parallel"] = "serial"
    activation: Literal["relu", "gelu", "silu", "tanh", "glu", "identity"] = "relu"
    scale: PositiveFloat = 1.0
    init: Literal["lora", "houlsby", "bert"] = "lora"
    dropout: Share = 0.0
    norm: bool = False
    norm_after: bool = False
    projection: Literal["dense", "kronecker", "tensor-train", "binary"] = "dense"
    terms: PositiveInt = 4
    projection_rank: PositiveInt = 1
    down: Literal["own", "shared", "frozen"] = "own"
    convolution: Convolution = "none"
    kernel: PositiveInt = 3
    grid: tuple[PositiveInt, ...] | None = None
    front: NonNegativeInt = 0
    tokens: Literal["all", "front", "rest"] = "all"
    routing: Routing = "none"
    gate: Literal["none", "site", "channel", "token", "sample"] = "none"
    skip: Share = 0.0
    experts: PositiveInt = 1
    join: Join = "mean"

    @field_validator("kernel")
    @classmethod
    def _centred(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError("a kernel has a middle: give an odd length")
        return kernel

    @field_validator("grid")
    @classmethod
    def _at_most_three_axes(cls, grid: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if grid is not None and not 1 <= len(grid) <= 3:
            raise ValueError(f"a grid has 1 to 3 axes, not {len(grid)}")
        return grid

    @model_validator(mode="after")
    def _goes_together(self) -> Bottleneck:
        if self.convolution == "branches" and self.width < 4:
            raise ValueError(f"branches split the width in half and quarters: give 4 or more, not {self.width}")
        if self.tokens != "all" and not self.front:
            raise ValueError(f"tokens: {self.tokens} needs front, the number of tokens that come first")
        if self.projection == "tensor-train" and self.down == "shared":
            raise ValueError("down: shared is not there for projection: tensor-train, which has few numbers anyway")
        check_experts(self.experts, self.join, self.projection, self.init)
        return self

    @property
    def starts_as_identity(self) -> bool:
        return self.init == "lora" or self.norm_after

    @property
    def passes_straight(self) -> bool:
        return self._map.passes_straight

    @property
    def shared(self) -> tuple[str, ...]:  # type: ignore[override]
        down = tuple(self._map.shapes("down", 1, 1)) if self.down == "shared" else ()
        return (*((RULES,) if self.projection == "kronecker" else ()), *down)

    @property
    def _map(self) -> Projection:
        if self.projection == "kronecker":
            return Kronecker(self.terms, self.projection_rank)
        if self.projection == "tensor-train":
            return TensorTrain(self.projection_rank)
        return Binary() if self.projection == "binary" else Dense()

    def fits(self, site: Site) -> None:
        super().fits(site)
        if self.placement == "parallel" and (not site.inputs or site.type == "conv"):
            raise SiteError(
                f"a parallel bottleneck needs a vector input; {site.name!r} is a {site.type} site: use serial"
            )
        if site.op.channels == 1 and site.type == "norm" and self.convolution != "none":
            raise SiteError(f"no convolution in an adapter goes on {site.name!r}, which normalises channels")
        widths = (self.width, self._opened, self._into(site), site.channels)
        if self.projection == "kronecker" and any(width % self.terms for width in widths):
            raise SiteError(
                f"terms must divide the adapter's widths at {site.name!r}, which are {widths}; {self.terms} does not"
            )

    @property
    def _opened(self) -> int:
        """Width that ``down`` gives."""
        return 2 * self.width if self.activation == "glu" else self.width

    def _into(self, site: Site) -> int:
        return site.inputs if self.placement == "parallel" else site.channels

    def _up_shapes(self, site: Site) -> Shapes:
        up = self._map.shapes("up", site.channels, self.width)
        up |= {"up_bias": (site.channels,)}
        return stacked_shapes(up, self.experts) if self.join == "mean" else up

    def _down_shapes(self, site: Site) -> Shapes:
        return self._map.shapes("down", self._opened, self._into(site))

    def shapes(self, site: Site) -> Shapes:
        into = self._into(site)
        shapes = {} if self.down == "frozen" else self._down_shapes(site)
        shapes |= {"down_bias": (self._opened,)} | self._up_shapes(site)
        shapes |= {RULES: (self.terms,) * 3} if self.projection == "kronecker" else {}
        shapes |= {"norm_gain": (into,), "norm_bias": (into,)} if self.norm else {}
        shapes |= {"after_gain": (site.channels,), "after_bias": (site.channels,)} if self.norm_after else {}
        return shapes | self._mixing(site) | self._gates(site)

    def _gates(self, site: Site) -> Shapes:
        if self.gate in ("token", "sample"):
            return {"gate": (self._into(site),), "gate_bias": (1,)}
        width = {"site": 1, "channel": site.channels}.get(self.gate)
        return {} if width is None else {"gate": (width,)}

    def constants(self, site: Site) -> Shapes:
        return self._down_shapes(site) if self.down == "frozen" else {}

    def _mixing(self, site: Site) -> Shapes:
        dims = len(site.shape) - 2 if site.type == "conv" else len(self.grid or (1,))
        return token_mixing.shapes(self.convolution, self.width, self.kernel, dims)

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        first: Start = "kaiming" if self.init == "lora" else self.init
        last: Start = first if self.norm_after else "zero" if self.init == "lora" else self.init
        start = self._map.initial("down", self._opened, self._into(site), first, rng)
        count = self.experts if self.join == "mean" else 1
        start |= stacked_initial(
            lambda: self._map.initial("up", site.channels, self.width, last, rng), count, self._up_shapes(site)
        )
        if isinstance(self._map, Kronecker):
            start[RULES] = self._map.rules(last, rng)
        if self.norm:
            start["norm_gain"] = torch.ones(self._into(site))
        return start | token_mixing.initial(self.convolution, self._mixing(site), rng)

    def working(self, site: Site) -> dict[str, Tensor]:
        if self.join != "union":
            return {}
        return {"owner": owners((site.channels, self.width), self.experts, site.name)}

    def saved(self, p: Any, site: Site) -> dict[str, Tensor]:
        found = super().saved(p, site)
        latent = ("down", "up") if self.projection == "binary" else ()
        return found | {name: to_bits(found[name]) for name in latent if name in found}

    def loaded(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: from_bits(tensor) if tensor.dtype == torch.bool else tensor for name, tensor in found.items()}

    def has_effect(self, p: Any, site: Site) -> bool:
        if self.norm_after:
            return bool(p.after_gain.any() or p.after_bias.any())
        up = self._map.matrix(self._reader(p), "up")
        return bool(up.any() or p.up_bias.any())

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        y = layer(x)
        z = (x if self.placement == "parallel" else y).movedim(p.op.channels, -1)
        change = self._change(p, z).movedim(-1, p.op.channels)
        return y + self.scale * change.to(y.dtype)

    def _change(self, p: Any, z: Tensor) -> Tensor:
        """The change for input ``z``, channels last."""
        inner = z
        if self.norm:
            inner = F.layer_norm(z, z.shape[-1:], p.norm_gain.to(z.dtype), p.norm_bias.to(z.dtype))
        down = self._map.matrix(lambda name: getattr(p, name), "down")
        hidden = F.linear(inner, down.to(z.dtype), p.down_bias.to(z.dtype))
        if self.routing != "none":
            hidden = _tokenwise(lambda h: token_mixing.routed(self.routing, h, self.front), hidden)
        hidden = F.dropout(self._activated(hidden), self.dropout, p.training)
        if self.convolution != "none":
            hidden = self._convolved(p, hidden)
        change = self._raised(p, hidden)
        if self.norm_after:
            gain, bias = p.after_gain.to(change.dtype), p.after_bias.to(change.dtype)
            change = F.layer_norm(change, change.shape[-1:], gain, bias)
        return self._gated(p, z, change)

    def _activated(self, hidden: Tensor) -> Tensor:
        return hidden if self.activation == "identity" else getattr(F, self.activation)(hidden)

    def _convolved(self, p: Any, hidden: Tensor) -> Tensor:
        def change(h: Tensor) -> Tensor:
            return token_mixing.convolved(self.convolution, p, h)

        if p.op.type == "conv":
            return change(hidden)
        return _tokenwise(lambda h: token_mixing.on_grid(change, h, self.front, self.grid), hidden)

    def _raised(self, p: Any, hidden: Tensor) -> Tensor:
        drawn = p.training and self.experts > 1
        index = torch.randint(self.experts, (1,), device=hidden.device) if drawn else None

        get = self._reader(p, index)
        up = self._map.matrix(get, "up")
        if index is not None and self.join == "union":
            up = up * (p.owner == index)
        return F.linear(hidden, up.to(hidden.dtype), get("up_bias").to(hidden.dtype))

    def _reader(self, p: Any, index: Tensor | None = None) -> Get:
        """How ``up`` reads its tensors: those of one expert, or of all together."""

        def get(name: str) -> Tensor:
            tensor: Tensor = getattr(p, name)
            return tensor if name == RULES else chosen(tensor, self.experts, self.join, index)

        return get

    def _gated(self, p: Any, z: Tensor, change: Tensor) -> Tensor:
        if self.gate in ("site", "channel"):
            change = change * (1 + p.gate.to(change.dtype))
        elif self.gate != "none":
            change = change * self._opening(p, z)
        if self.tokens != "all":
            place = torch.arange(change.shape[-2], device=change.device).unsqueeze(-1)
            change = change * ((place < self.front) if self.tokens == "front" else (place >= self.front))
        if self.skip and p.training:
            kept = torch.full((1,), 1 - self.skip, device=change.device, dtype=change.dtype).bernoulli()
            change = change * (kept / (1 - self.skip))
        return change

    def _opening(self, p: Any, z: Tensor) -> Tensor:
        if self.gate == "sample" and z.ndim > 2:
            z = z.mean(dim=tuple(range(1, z.ndim - 1)), keepdim=True)
        return torch.sigmoid(F.linear(z, p.gate.to(z.dtype).unsqueeze(0), p.gate_bias.to(z.dtype)))


def _tokenwise(change: Any, z: Tensor) -> Tensor:
    """A function of ``(batch, tokens, width)`` on a tensor with fewer or more axes before the last two."""
    if z.ndim == 2:
        return change(z.unsqueeze(1)).squeeze(1)
    return change(z.flatten(0, -3)).view(z.shape) if z.ndim > 3 else change(z)
