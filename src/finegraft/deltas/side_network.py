"""Side networks: small networks beside a stack of blocks, fed by its states, that send no gradient into it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from finegraft.deltas.delta import Delta, Layer, Shapes
from finegraft.deltas.side_body import Sizes, block, norm
from finegraft.deltas.side_pruning import pruned
from finegraft.deltas.states import States
from finegraft.errors import SiteError
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("side-network")
class SideNetwork(Delta):
    """``f_L + up(s_n)`` with ``s_i = block_i(m_i s_(i-1) + (1 - m_i) down_i(f_i))`` (Ladder Side-Tuning, 2206.06522).

    ``f_0`` is what enters the stack, ``f_i`` what its block ``i`` gives, detached; ``s_0 = down_0(f_0)``. So training
    needs no graph of the base, and keeps of it no more than the inputs of the down-maps. Side blocks have as many heads
    as the base's, and attend as the base's last block does: same mask, rotated by the same positions, keys and values
    in the same cache. Of an encoder and a decoder only the decoder has one, which attends to the frozen encoder's
    output.

    Attributes:
        reduction: ``r``; state, heads and FFN are ``1/r`` as wide as the base's.
        drop_every: leave out the side blocks beside blocks 0, k, 2k ...; 0 leaves out none. The last one stays.
        down: the maps from the base's states: ``linear`` with bias, ``low-rank``, or pooling without parameters.
        down_rank: inner width of ``low-rank``.
        gate: whether ``m_i = sigmoid(a_i / T)`` is one number or one for each channel.
        gate_start: ``a_i`` at the start.
        temperature: ``T``.
        fusion: ``ladder``, or ``late`` (LEVI, 2402.04644): the side network sees ``f_0`` alone, and ``up`` reads the
            mean over blocks of ``gelu(down_i(f_i) + s_n)``.
        mix: ``add``: ``f_L + up(s)``, where ``up`` starts at zero; or ``gate``: ``w f_L + (1 - w) up(s)`` with
            ``w = sigmoid(u)`` for each channel, which is not the identity.
        mix_start: ``u`` at the start; the larger, the nearer to the base.
        init: of the side blocks: ``random``, or cut out of the base's by ``magnitude``; then ``down`` starts as the
            choice of the channels that were kept, if it is linear.
        activation: of the FFN; ``base`` is that of the base.
    """

    kind = "side-network"
    on = ("network",)
    reads_weight: ClassVar[bool] = False

    reduction: PositiveInt = 8
    drop_every: NonNegativeInt = 0
    down: Literal["linear", "low-rank", "max-pool", "average-pool"] = "linear"
    down_rank: PositiveInt = 64
    gate: Literal["scalar", "channel"] = "scalar"
    gate_start: float = 0.0
    temperature: PositiveFloat = 0.1
    fusion: Literal["ladder", "late"] = "ladder"
    mix: Literal["add", "gate"] = "add"
    mix_start: float = 1.0
    init: Literal["random", "magnitude"] = "random"
    activation: Literal["base", "relu", "gelu", "silu"] = "base"

    @property
    def starts_as_identity(self) -> bool:
        return self.mix == "add"

    def at(self, site: Site) -> SideNetwork:
        if site.network is None or self.activation != "base":
            return self
        return self.model_copy(update={"activation": site.network.activation})

    def _kept(self, depth: int) -> list[int]:
        """Blocks of the base that have a side block."""
        return [b for b in range(depth) if b == depth - 1 or not self.drop_every or b % self.drop_every]

    def _sizes(self, site: Site) -> Sizes:
        number = len(self._kept(len(site.network.blocks)))
        return Sizes.of(site.network, site.channels, self.reduction, number)

    def fits(self, site: Site) -> None:
        super().fits(site)
        if (width := self._sizes(site).width) > site.channels:
            raise SiteError(f"{site.name!r} is {site.channels} wide; a side network needs at least {width}")

    def shapes(self, site: Site) -> Shapes:
        sizes, wide = self._sizes(site), site.channels
        n, w = sizes.number, sizes.width
        maps: dict[str, Shapes] = {
            "linear": {"down": (n + 1, w, wide), "down_bias": (n + 1, w)},
            "low-rank": {"down_first": (n + 1, self.down_rank, wide), "down": (n + 1, w, self.down_rank)},
        }
        down = maps.get(self.down, {})
        gates: Shapes = {"gates": (n,) if self.gate == "scalar" else (n, w)} if self.fusion == "ladder" else {}
        mix: Shapes = {"mix": (wide,)} if self.mix == "gate" else {}
        return sizes.shapes(site.network) | down | gates | {"up": (wide, w), "up_bias": (wide,)} | mix

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        sizes, shapes = self._sizes(site), self.shapes(site)
        start = sizes.initial(site.network, rng)
        names = ("down", "down_first", *(("up",) if self.mix == "gate" else ()))
        start |= {name: kaiming_uniform(shapes[name], rng) for name in names if name in shapes}
        if "gates" in shapes:
            start["gates"] = torch.full(shapes["gates"], self.gate_start)
        if "mix" in shapes:
            start["mix"] = torch.full(shapes["mix"], self.mix_start)
        if self.init == "magnitude":
            found = pruned(site.network, sizes, self._kept(len(site.network.blocks)), start, site.channels)
            start |= {name: tensor for name, tensor in found.items() if tensor.shape == shapes.get(name)}
        return start

    def has_effect(self, p: Any, site: Site) -> bool:
        return self.mix == "gate" or bool(p.up.any() or p.up_bias.any())

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        states, y = layer.states, layer(x)
        s = self.state(p, states)
        change = F.linear(s, p.up.to(s.dtype), p.up_bias.to(s.dtype)).to(y.dtype)
        if change.shape != y.shape:
            raise SiteError(
                f"the side network at {p.site!r} gives {tuple(change.shape)} where the stack gives {tuple(y.shape)}, "
                "as where a prompt leaves the sequence with the last block: use one of the two"
            )
        if self.mix == "add":
            return y + change
        return torch.lerp(change, y, torch.sigmoid(p.mix).to(y.dtype))

    def state(self, p: Any, states: States) -> Float[Tensor, "batch n width"]:
        """The normalised final state of the side network."""
        hidden = [h.detach() for h in states.hidden]
        kept = self._kept(len(hidden) - 1)
        s = self._lowered(p, 0, hidden[0])
        for i, b in enumerate(kept):
            if self.fusion == "ladder":
                keep = torch.sigmoid(p.gates[i] / self.temperature).to(s.dtype)
                s = torch.lerp(self._lowered(p, i + 1, hidden[b + 1]), s, keep)
            s = block(p, i, s, states, self.activation)
        s = norm(p, -1, s)
        if self.fusion == "ladder":
            return s
        views = [F.gelu(self._lowered(p, i + 1, hidden[b + 1]) + s) for i, b in enumerate(kept)]
        return torch.stack(views).mean(dim=0)

    def _lowered(self, p: Any, i: int, f: Tensor) -> Tensor:
        """State ``i`` of the base at the side network's width."""
        if self.down == "linear":
            return F.linear(f, p.down[i].to(f.dtype), p.down_bias[i].to(f.dtype))
        if self.down == "low-rank":
            return F.linear(F.linear(f, p.down_first[i].to(f.dtype)), p.down[i].to(f.dtype))
        pool = F.adaptive_max_pool1d if self.down == "max-pool" else F.adaptive_avg_pool1d
        return pool(f.flatten(0, -2), p.up.shape[1]).unflatten(0, f.shape[:-1])
