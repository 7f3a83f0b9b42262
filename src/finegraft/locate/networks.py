"""Network sites: whole stacks of transformer blocks, for networks that run beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from finegraft.locate.ops import NETWORK
from finegraft.locate.roles import CROSS_SEGMENT, NETWORK_ROLES
from finegraft.locate.site import Site
from finegraft.locate.sublayers import path_of

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "activation")


@dataclass(frozen=True)
class Network:
    """What the blocks of a stack are like.

    Attributes:
        blocks: the modules, in order.
        parts: for each block, the layers and bare tensors of its self-attention and FFN by role.
        heads: heads of the queries.
        key_heads: heads of keys and values.
        head_width: numbers of one head.
        inner: width inside the FFN.
        gated: whether the FFN has a gate.
        centred: whether norms subtract the mean and have a bias, unlike RMS norms.
        activation: ``relu``, ``gelu`` or ``silu``, of the FFN.
        rotary: whether positions rotate queries and keys.
        causal: whether attention without a mask is causal.
        memory: width of the encoder's output that the blocks attend to; 0 where they do not.
    """

    blocks: tuple[nn.Module, ...]
    parts: tuple[dict[str, Site], ...]
    heads: int
    key_heads: int
    head_width: int
    inner: int
    gated: bool
    centred: bool
    activation: str
    rotary: bool
    causal: bool
    memory: int


def network_sites(
    parts: Iterable[Site], spans: Iterable[Site], calls: Iterable[Site], modules: Mapping[str, nn.Module]
) -> Iterator[Site]:
    """The stacks whose blocks all have attention and an FFN and hand on hidden states of one width.

    The role is ``encoder`` for a stack that another one attends to, and ``network`` for all others. Left out are stacks
    of one block that runs several times.

    Args:
        parts: the layers and bare tensors of the model.
        spans: its sublayers.
        calls: its attention calls.
        modules: the model's modules by path.
    """
    members: dict[str, dict[str, list[Site]]] = {}
    for site in parts:
        if site.block:
            members.setdefault(site.stack, {}).setdefault(site.block, []).append(site)
    widths: dict[str, list[int]] = {}
    for span in spans:
        widths.setdefault(span.block, []).append(span.fan_out)
    roles = {span.block: set[str]() for span in spans}
    for span in spans:
        roles[span.block].add(span.role)
    found = []
    for blocks in members.values():
        every = {width for block in blocks for width in widths.get(block, ())}
        complete = all(roles.get(block, set()) >= {"attn", "ffn"} for block in blocks)
        if complete and len(every) == 1 and not _runs_again(len(blocks), modules):
            causal = {call.block: bool(getattr(call.module, "is_causal", True)) for call in calls if _of_itself(call)}
            found.append((blocks, every.pop(), _network(blocks, modules, causal)))
    reading = any(network.memory for _, _, network in found)
    for blocks, width, network in found:
        feeds = reading and not network.memory
        yield _site(blocks, width, network, NETWORK_ROLES[1] if feeds else NETWORK_ROLES[0])


def _site(blocks: dict[str, list[Site]], width: int, network: Network, role: str) -> Site:
    paths = list(blocks)
    name = paths[0].rpartition(".")[0] if len({path.rpartition(".")[0] for path in paths}) == 1 else ""
    first = blocks[paths[0]][0]
    return Site(
        name=name or "network",
        kind="network",
        type="network",
        role=role,
        layer=None,
        module=network.blocks[-1],
        tensor="",
        op=NETWORK,
        shape=(width, width),
        entry=network.blocks[0],
        stack=first.stack,
        network=network,
    )


def _runs_again(blocks: int, modules: Mapping[str, nn.Module]) -> bool:
    depth = getattr(getattr(modules[""], "config", None), "num_hidden_layers", None)
    return blocks == 1 and isinstance(depth, int) and depth > 1


def _network(blocks: Mapping[str, list[Site]], modules: Mapping[str, nn.Module], causal: Mapping[str, bool]) -> Network:
    own = [{site.role: site for site in reversed(sites) if _coupled(site)} for sites in blocks.values()]
    first, sites = own[0], next(iter(blocks.values()))
    heads, key_heads, width = _heads(first)
    norms = [site for site in sites if site.role == "norm"]
    cross = [site for site in sites if site.role == "k" and CROSS_SEGMENT.search(_inside(site))]
    return Network(
        blocks=tuple(modules[path] for path in blocks),
        parts=tuple(own),
        heads=heads,
        key_heads=key_heads,
        head_width=width,
        inner=first["down"].fan_in if "down" in first else 0,
        gated="gate" in first
        or ("up" in first and "down" in first and first["up"].fan_out == 2 * first["down"].fan_in),
        centred=any(site.bias is not None for site in norms),
        activation=_activation(modules),
        rotary=any("rotary" in type(module).__name__.lower() for module in modules.values()),
        causal=causal.get(next(iter(blocks)), False),
        memory=cross[0].fan_in if cross else 0,
    )


def _inside(site: Site) -> str:
    return path_of(site).removeprefix(f"{site.block}.")


def _of_itself(call: Site) -> bool:
    return bool(call.block) and not CROSS_SEGMENT.search(_inside(call))


def _coupled(site: Site) -> bool:
    return site.coupling is not None and not CROSS_SEGMENT.search(_inside(site))


def _heads(parts: Mapping[str, Site]) -> tuple[int, int, int]:
    """Heads of queries and of keys, and the width of one; a single head where nothing tells them."""
    site = parts.get("k") or parts.get("qkv")
    out = parts.get("o")
    if site is None or out is None or site.coupling.flaw or out.coupling.flaw:
        width = out.fan_in if out is not None else next(iter(parts.values())).fan_in
        return 1, 1, width
    number, shared = site.coupling.number, out.coupling.spans[0][1]
    spans = [width for _, width in site.coupling.spans]
    width = spans[-1] if site.role == "k" or len(spans) == 3 else (spans[0] - shared) // 2
    return number * shared // width, number, width


def _activation(modules: Mapping[str, nn.Module]) -> str:
    config: Any = getattr(modules[""], "config", None)
    named = next((v for name in _ACTIVATIONS if isinstance(v := getattr(config, name, None), str)), "gelu")
    return "silu" if named in ("silu", "swish") else "relu" if named.startswith("relu") else "gelu"
