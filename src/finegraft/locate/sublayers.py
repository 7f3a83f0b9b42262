"""Sites that span several layers: attention and feed-forward sublayers, and attention calls."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, count, takewhile
from typing import NamedTuple

from torch import nn

from finegraft.locate.blocks import Blocks
from finegraft.locate.ops import ATTENTION, BLOCK, SUBLAYER
from finegraft.locate.roles import (
    ATTENTION_ROLE,
    ATTENTION_SEGMENT,
    BLOCK_ROLE,
    CROSS_SEGMENT,
    EXPERTS_SEGMENT,
    FFN_SEGMENT,
)
from finegraft.locate.site import Site

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"


def attention_calls(parts: Iterable[Site], modules: Mapping[str, nn.Module], blocks: Blocks) -> Iterator[Site]:
    """The modules that fetch an attention function from Transformers' registry and pass themselves to it.

    The shape of such a site is the width of its keys over all heads, empty where that cannot be worked out.
    """
    keys = {site.name.rpartition(".")[0]: site.fan_out for site in parts if site.role == "k"}
    for path, module in modules.items():
        if _calls_registry(type(module)):
            block = blocks.of(path)
            yield Site(
                name=path,
                kind="attention",
                type="attention",
                role=ATTENTION_ROLE,
                layer=block.index if block else None,
                module=module,
                tensor="",
                op=ATTENTION,
                shape=(keys[path],) if path in keys else _key_width(module),
                block=block.path if block else "",
                stack=block.stack if block else "",
            )


def _key_width(module: nn.Module) -> tuple[int, ...]:
    """Width of the keys where one fused layer makes queries, keys and values."""
    config = getattr(module, "config", None)
    queries = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not queries or not hidden:
        return ()
    heads = getattr(config, "num_key_value_heads", None) or queries
    return (heads * (getattr(module, "head_dim", None) or hidden // queries),)


def _calls_registry(cls: type[nn.Module]) -> bool:
    forwards = [vars(ancestor)["forward"] for ancestor in cls.__mro__ if "forward" in vars(ancestor)]
    codes = [getattr(inspect.unwrap(forward), "__code__", None) for forward in forwards]
    return any(code is not None and _REGISTRY in code.co_names for code in codes)


def sublayers(parts: Iterable[Site], modules: Mapping[str, nn.Module], taken: set[str]) -> Iterator[Site]:
    """The sublayers of every block in which attention or feed-forward layers are recognised.

    Args:
        parts: the layers and bare tensors of the model.
        modules: the model's modules by path.
        taken: names of other sites; a sublayer whose name is taken ends in ``.sublayer``.
    """
    members: dict[str, list[Site]] = {}
    for site in parts:
        if site.block and site.type in ("linear", "tensor"):
            members.setdefault(site.block, []).append(site)
    for block, within in members.items():
        names = set(taken)
        for span in [*_attention(block, within, modules), *_ffn(block, within, modules)]:
            name = _free(f"{block}.{span.name}", names)
            names.add(name)
            yield Site(
                name=name,
                kind="sublayer",
                type="sublayer",
                role=span.role,
                layer=within[0].layer,
                module=span.exit,
                tensor="",
                op=SUBLAYER,
                shape=span.widths,
                entry=span.entry,
                block=block,
                stack=within[0].stack,
            )


def whole_blocks(parts: Iterable[Site], spans: Iterable[Site], modules: Mapping[str, nn.Module]) -> Iterator[Site]:
    """The blocks that take and give hidden states of one width, residuals included.

    Left out are stacks that work out biases from positions in their blocks, which so must see all tokens.

    Args:
        parts: the layers and bare tensors of the model.
        spans: its sublayers.
        modules: the model's modules by path.
    """
    by_position = {site.stack for site in parts if site.block and "relative" in site.name}
    found: dict[str, dict[str, Site]] = {}
    for site in spans:
        found.setdefault(site.block, {})[site.role] = site
    for block, roles in found.items():
        ffn = roles.get("ffn")
        if ffn is None or "attn" not in roles or ffn.stack in by_position or ffn.fan_in != ffn.fan_out:
            continue
        own = replace(ffn, name=block, kind="block", type="block", role=BLOCK_ROLE)
        yield replace(own, op=BLOCK, module=modules[block], entry=modules[block])


class _Span(NamedTuple):
    """From the module that takes a sublayer's input to the one that gives its output, ``(out, in)`` wide."""

    role: str
    name: str
    entry: nn.Module
    exit: nn.Module
    widths: tuple[int, int]


def _free(name: str, taken: set[str]) -> str:
    candidates = chain((name, f"{name}.sublayer"), (f"{name}.{number}" for number in count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _attention(block: str, within: list[Site], modules: Mapping[str, nn.Module]) -> Iterator[_Span]:
    for key, group in grouped(block, within, ("q", "k", "v", "qkv", "o"), ATTENTION_SEGMENT).items():
        entries = _having(group, "q") or _having(group, "qkv")
        exits = _having(group, "o")
        if entries and exits:
            name = "cross_attn" if CROSS_SEGMENT.search(key) else "attn"
            yield from _span("attn", name, entries[0], exits[-1], modules)


def _ffn(block: str, within: list[Site], modules: Mapping[str, nn.Module]) -> Iterator[_Span]:
    routers = _having(within, "router")
    if routers:
        experts = [site for site in within if any(map(EXPERTS_SEGMENT.match, path_of(site).split(".")))]
        path = _common([path_of(site) for site in routers + experts])
        width = routers[0].fan_in
        yield _Span("ffn", "ffn", modules[path], modules[path], (width, width))
        within = [site for site in within if not path_of(site).startswith(f"{path}.")]
    for group in grouped(block, within, ("up", "gate", "down"), FFN_SEGMENT).values():
        entries = [site for site in group if site.role in ("up", "gate")]
        exits = _having(group, "down")
        if len(entries) > 1 and len(exits) == 1 and (path := _enclosing(block, [*entries, *exits], modules)):
            yield _Span("ffn", "ffn", modules[path], modules[path], (exits[0].fan_out, entries[0].fan_in))
        elif entries and len(exits) == 1:
            yield from _span("ffn", "ffn", entries[0], exits[0], modules)


def _span(role: str, name: str, entry: Site, exit: Site, modules: Mapping[str, nn.Module]) -> Iterator[_Span]:
    """From entry to exit; both are the enclosing module where a bare tensor is read, not a layer called.

    An enclosing module with a norm of its own probably adds the residual itself, so it is no sublayer.
    """
    widths = (exit.fan_out, entry.fan_in)
    if entry.kind == exit.kind == "layer":
        yield _Span(role, name, entry.module, exit.module, widths)
        return
    enclosing = modules[_common([path_of(entry), path_of(exit)])]
    if not any("norm" in type(module).__name__.lower() for module in enclosing.modules()):
        yield _Span(role, name, enclosing, enclosing, widths)


def _enclosing(block: str, group: list[Site], modules: Mapping[str, nn.Module]) -> str:
    """Path of the module inside the block that is just these layers, so that its input is that of all; else empty."""
    path = _common([path_of(site) for site in group])
    if not path.startswith(f"{block}."):
        return ""
    within = (module for name, module in modules.items() if f"{name}.".startswith(f"{path}."))
    layers = [module for module in within if next(module.parameters(recurse=False), None) is not None]
    return path if len(layers) == len(group) else ""


def grouped(block: str, within: list[Site], roles: tuple[str, ...], telling: re.Pattern[str]) -> dict[str, list[Site]]:
    """Sites of these roles by the outermost telling segment above them, inside the block."""
    groups: dict[str, list[Site]] = {}
    for site in within:
        if site.role in roles:
            above = site.name.removeprefix(f"{block}.").split(".")[:-1]
            depth = next((at for at, segment in enumerate(above, 1) if telling.search(segment)), 0)
            groups.setdefault(".".join(above[:depth]), []).append(site)
    return groups


def _having(sites: list[Site], role: str) -> list[Site]:
    return [site for site in sites if site.role == role]


def path_of(site: Site) -> str:
    """Path of the module that holds the site's tensor."""
    return site.name if site.kind == "layer" else site.name.removesuffix(site.tensor).removesuffix(".")


def _common(paths: list[str]) -> str:
    """Path of the innermost module that is or contains all of these."""
    segments = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, segments))
