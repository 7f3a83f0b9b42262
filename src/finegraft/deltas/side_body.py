"""Blocks of a side network: transformer blocks as functions, their tensors stacked over blocks.

Norms come before attention and FFN, whatever the base does; there are no biases but those of norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from finegraft.deltas.states import States
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.networks import Network

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a side network, each the base's by the reduction.

    Attributes:
        number: blocks.
        width: of its states.
        head: numbers of a head; there are as many heads as in the base.
        inner: width inside the FFN.
    """

    number: int
    width: int
    head: int
    inner: int

    @classmethod
    def of(cls, network: Network, width: int, reduction: int, number: int) -> Sizes:
        """Sizes beside a stack of this width; heads are an even number of at least 2 wide, for rotations."""
        head = max(2, round(network.head_width / reduction / 2) * 2)
        return cls(number, max(2, width // reduction), head, max(1, network.inner // reduction))

    def shapes(self, network: Network) -> Shapes:
        """Shapes of the tensors of all blocks, and of the norm behind the last."""
        n, w, a = self.number, self.width, self.head
        into, read = (n, network.heads, a, w), (n, network.key_heads, a, w)
        own: Shapes = {"to_query": into, "to_key": read, "to_value": read, "output": (n, w, network.heads, a)}
        cross = {f"cross_{name}": shape for name, shape in own.items()} | {"memory_down": (w, network.memory)}
        ffn: Shapes = {"inner": (n, self.inner, w), "outer": (n, w, self.inner)}
        gate: Shapes = {"inner_gate": (n, self.inner, w)} if network.gated else {}
        norms = {"norms": ((3 if network.memory else 2) * n + 1, w)}
        biases = {"norm_biases": norms["norms"]} if network.centred else {}
        return own | (cross if network.memory else {}) | ffn | gate | norms | biases

    def initial(self, network: Network, rng: torch.Generator) -> dict[str, Tensor]:
        """A random start; norms begin as plain norms."""
        shapes = {n: s for n, s in self.shapes(network).items() if not n.startswith("norm")}
        drawn = {name: _by_fan_in(shape, name, rng) for name, shape in shapes.items()}
        return drawn | {"norms": torch.ones(self.shapes(network)["norms"])}


def _by_fan_in(shape: tuple[int, ...], name: str, rng: torch.Generator) -> Tensor:
    """Kaiming-uniform by the axes that the map reads: the last two where it reads heads."""
    if not name.endswith("output"):
        return kaiming_uniform(shape, rng)
    return kaiming_uniform((*shape[:-2], shape[-2] * shape[-1]), rng).view(shape)


def block(p: Any, i: int, s: Float[Tensor, "batch n width"], states: States, activation: str) -> Tensor:
    """One block's output: self-attention, attention to the encoder's output where there is one, FFN."""
    dtype, number = s.dtype, len(p.to_query)
    norms = 3 if hasattr(p, "cross_to_query") else 2
    z = norm(p, norms * i, s)
    query, key, value = (_heads(z, getattr(p, name)[i]) for name in ("to_query", "to_key", "to_value"))
    if states.rotation is not None:
        query, key = _rotated(query, states.rotation), _rotated(key, states.rotation)
    if states.extended is not None:
        key, value = states.extended(id(p.up), i, number, key, value)
    mask = _with_bias(states.mask, states.bias, dtype)
    s = s + _joined(_attend(query, key, value, mask, causal=states.causal and states.mask is None), p.output[i])
    if norms == 3 and states.memory is not None:
        memory = F.linear(states.memory.to(dtype), p.memory_down.to(dtype))
        query = _heads(norm(p, norms * i + 1, s), p.cross_to_query[i])
        key, value = _heads(memory, p.cross_to_key[i]), _heads(memory, p.cross_to_value[i])
        s = s + _joined(_attend(query, key, value, states.memory_mask, causal=False), p.cross_output[i])
    z = norm(p, norms * i + norms - 1, s)
    inner = F.linear(z, p.inner[i].to(z.dtype))
    if hasattr(p, "inner_gate"):
        inner = getattr(F, activation)(F.linear(z, p.inner_gate[i].to(z.dtype))) * inner
    else:
        inner = getattr(F, activation)(inner)
    return s + F.linear(inner, p.outer[i].to(inner.dtype))


def norm(p: Any, index: int, s: Tensor) -> Tensor:
    """Layer or RMS normalisation with gain ``index``; -1 is the one behind the last block."""
    gain = p.norms[index].to(s.dtype)
    if hasattr(p, "norm_biases"):
        return F.layer_norm(s, s.shape[-1:], gain, p.norm_biases[index].to(s.dtype))
    return F.rms_norm(s, s.shape[-1:], gain, 1e-6)


def _heads(z: Tensor, matrix: Float[Tensor, "heads head width"]) -> Float[Tensor, "batch heads n head"]:
    projected = F.linear(z, matrix.flatten(0, 1).to(z.dtype))
    return projected.unflatten(-1, matrix.shape[:2]).transpose(1, 2)


def _joined(y: Float[Tensor, "batch heads n head"], matrix: Float[Tensor, "width heads head"]) -> Tensor:
    return F.linear(y.transpose(1, 2).flatten(2), matrix.flatten(1).to(y.dtype))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    groups, n, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    causal = causal and n > 1
    if causal and (n < keys or mask is not None):
        seen = torch.ones(n, keys, dtype=torch.bool, device=query.device).tril(keys - n)
        mask, causal = seen if mask is None else mask.masked_fill(~seen, torch.finfo(mask.dtype).min), False
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


def _with_bias(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias is None or mask is None:
        return mask if bias is None else bias.to(dtype)
    if mask.dtype == torch.bool:
        return bias.to(dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return bias.to(dtype) + mask.to(dtype)


def _rotated(x: Float[Tensor, "batch heads n head"], rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs ``(i, i + half)`` of a head turned by evenly spaced ones of the base's frequencies."""
    pairs = min(x.shape[-1], rotation[0].shape[-1]) // 2
    at = frequencies(rotation[0].shape[-1] // 2, pairs).to(x.device)
    cos, sin = (part.index_select(-1, at).to(x.dtype).unsqueeze(-3) for part in rotation)
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def frequencies(number: int, kept: int) -> Tensor:
    """Indices of ``kept`` evenly spaced ones of ``number`` frequencies."""
    return torch.arange(kept) * number // kept
