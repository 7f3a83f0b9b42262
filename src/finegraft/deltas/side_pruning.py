"""Side blocks cut out of the base's: for each matrix the rows and columns of largest summed magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finegraft.deltas.side_body import Sizes, frequencies
from finegraft.locate.networks import Network
from finegraft.locate.site import Site

Matrices = dict[str, Tensor]


def pruned(
    network: Network, sizes: Sizes, kept: Sequence[int], start: Mapping[str, Tensor], width: int
) -> dict[str, Tensor]:
    """The start of a side network's blocks and of its down-maps, ``(number + 1, side width, base width)``.

    Channels of the residual stream are chosen once for all blocks, positions within a head and channels of an FFN block
    by block. Matrices that a block does not hold as such (quantised, of many experts, fused in an unknown order)
    stay as they are in ``start``.

    Args:
        network: what the base's blocks are like.
        sizes: of the side network.
        kept: the base's blocks that have a side block.
        start: a random start, by name.
        width: of the base's states.
    """
    blocks = [_matrices(network.parts[b], network) for b in range(len(network.blocks))]
    reading = [m.abs().sum(0) for own in blocks for name, m in own.items() if name not in ("output", "outer")]
    writing = [own[name].abs().sum(1) for own in blocks for name in ("output", "outer") if name in own]
    if not reading + writing:
        return {}
    channels = _largest(torch.stack([m.float() for m in reading + writing]).sum(0), sizes.width)
    found = {name: start[name].clone() for name in blocks[0] if name in start}
    for i, b in enumerate(kept):
        for name, matrix in _cut(blocks[b], network, sizes, channels).items():
            if name in found:
                found[name][i] = matrix.reshape(found[name][i].shape)
    choice = torch.zeros(sizes.width, width)
    choice[torch.arange(sizes.width), channels] = 1
    return found | {"down": choice.expand(sizes.number + 1, -1, -1).clone()}


def _largest(importance: Float[Tensor, " n"], kept: int) -> Int[Tensor, " kept"]:
    return importance.topk(kept).indices.sort().values


def _matrices(parts: Mapping[str, Site], network: Network) -> Matrices:
    """The block's matrices ``(out, in)`` under the names that a side network has for them."""
    own = {role: site.base_weight.float().cpu() for role, site in parts.items() if _plain(site)}
    found: Matrices = {}
    names = {
        "q": "to_query",
        "k": "to_key",
        "v": "to_value",
        "o": "output",
        "up": "inner",
        "gate": "inner_gate",
        "down": "outer",
    }
    for role, matrix in own.items():
        if role == "qkv":
            found |= _split_heads(matrix, parts[role], network)
        elif role == "up" and len(parts[role].coupling.spans) == 2:
            found |= dict(zip(("inner_gate", "inner"), matrix.chunk(2), strict=True))
        else:
            found[names[role]] = matrix
    return found


def _plain(site: Site) -> bool:
    weight = site.parameter
    return bool(weight is not None and weight.is_floating_point() and not site.batch and not site.coupling.flaw)


def _split_heads(matrix: Tensor, site: Site, network: Network) -> Matrices:
    names = ("to_query", "to_key", "to_value")
    counts = [network.heads, network.key_heads, network.key_heads]
    if len(site.coupling.spans) == 3:
        return dict(zip(names, matrix.split([c * network.head_width for c in counts]), strict=True))
    group = matrix.unflatten(0, (network.key_heads, -1))
    parts = group.split([c // network.key_heads * network.head_width for c in counts], dim=1)
    return {name: part.flatten(0, 1) for name, part in zip(names, parts, strict=True)}


def _cut(own: Matrices, network: Network, sizes: Sizes, channels: Tensor) -> Matrices:
    """The matrices with the rows and columns that stay."""
    wide, cut = network.head_width, {}
    seen = _positions([own[n] for n in ("to_query", "to_key") if n in own], network, sizes, paired=network.rotary)
    given = [own[n] for n in ("to_value",) if n in own] + [own[n].T for n in ("output",) if n in own]
    shown = _positions(given, network, sizes, paired=False)
    for name, within in (("to_query", seen), ("to_key", seen), ("to_value", shown)):
        if name in own:
            cut[name] = own[name].unflatten(0, (-1, wide))[:, within][..., channels]
    if "output" in own:
        cut["output"] = own["output"][channels].unflatten(1, (-1, wide))[..., shown]
    rows = [own[n].abs().sum(1) for n in ("inner", "inner_gate") if n in own]
    rows += [own[n].abs().sum(0) for n in ("outer",) if n in own]
    if rows:
        inner = _largest(torch.stack(rows).sum(0), sizes.inner)
        cut |= {n: own[n][inner][:, channels] for n in ("inner", "inner_gate") if n in own}
        cut |= {n: own[n][channels][:, inner] for n in ("outer",) if n in own}
    return cut


def _positions(matrices: Sequence[Tensor], network: Network, sizes: Sizes, *, paired: bool) -> Tensor:
    """Positions that stay in every head: those of largest magnitude over heads, or evenly spaced pairs that rotate."""
    wide, kept = network.head_width, sizes.head
    if paired or not matrices:
        half = frequencies(wide // 2, kept // 2)
        return torch.cat([half, half + wide // 2])
    importance = sum(m.abs().sum(1).unflatten(0, (-1, wide)).sum(0) for m in matrices)
    return _largest(torch.as_tensor(importance), kept)
