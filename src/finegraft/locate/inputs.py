"""Input sites: where a stack of transformer blocks takes its sequence, and where it gives it back."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from finegraft.locate.ops import INPUT, op_for
from finegraft.locate.roles import CROSS_SEGMENT, INPUT_ROLES, NUMBERED_SEGMENT
from finegraft.locate.site import Site

_ATTENTION = ("q", "k", "v", "qkv", "o")
_SIGNALS = ("pixel_values", "input_features", "input_values")
_CLASS_TOKEN = re.compile(r"(cls|class|dist|distillation|reg|register)_(tokens?|embeddings?)")
_POSITIONS = re.compile(r"pos|wpe", re.IGNORECASE)


@dataclass(frozen=True)
class Way:
    """The way of a sequence through a stack.

    Attributes:
        names: names of the arguments of the module that runs the stack (the site's module), in order.
        table: turns token ids into the vectors that enter; None where the sequence is no text.
        entry: the module before whose first argument a prompt goes; None where it goes into ``inputs_embeds``.
        exit: the module inside whose output leaves the prompt's positions behind; None where the site's module does.
        reader: the decoder that attends to what this stack gives, the prompt's positions included, so that these are
            not left behind and its mask of them grows.
        leading: class tokens that stay in front of a prompt.
        positions: longest sequence that a table of positions allows; None where nothing limits it.
    """

    names: tuple[str, ...]
    table: nn.Module | None = None
    entry: nn.Module | None = None
    exit: nn.Module | None = None
    reader: nn.Module | None = None
    leading: int = 0
    positions: int | None = None


def input_sites(parts: Iterable[Site], modules: Mapping[str, nn.Module], taken: set[str]) -> Iterator[Site]:
    """The inputs of every stack of attention blocks that a prompt could be put before.

    The shape of such a site is the width of the vectors that enter. Left out are stacks that take token ids and no
    vectors, and those whose blocks differ in width.

    Args:
        parts: the layers and bare tensors of the model.
        modules: the model's modules by path.
        taken: names of other sites.
    """
    parts = list(parts)
    stacks: dict[str, list[Site]] = {}
    for site in parts:
        if site.block and site.role in _ATTENTION and site.type in ("linear", "tensor"):
            stacks.setdefault(site.stack, []).append(site)
    whole = [own for own in stacks.values() if any(site.role == "o" for site in own)]
    found = [site for own in whole for site in _site(own, parts, modules)]
    readers = {site.name: site.module for site in found if site.role == INPUT_ROLES[1] and site.input.table}
    for site in found:
        reader = next(iter(readers.values()), None) if site.role == INPUT_ROLES[0] and site.input.table else None
        if reader is not None:
            site = replace(site, input=replace(site.input, exit=None, reader=reader))
        yield replace(site, name=next(n for n in _names(site.name) if n not in taken))


def _names(path: str) -> Iterator[str]:
    name = f"{path}.input" if path else "input"
    yield from (name, *(f"{name}.{number}" for number in range(2, 100)))


def _site(own: list[Site], parts: list[Site], modules: Mapping[str, nn.Module]) -> Iterator[Site]:
    """The input of one stack, still under the path of the module that runs it."""
    widths = {site.fan_in for site in own if site.role in ("q", "qkv")}
    enclosing = _enclosing([site.block for site in own], modules)
    path = _host(enclosing, modules)
    if path is None or len(widths) > 1 or not widths:
        return
    host, names = modules[path], _arguments(modules[path])
    first, last = (modules[choose(own, key=lambda site: site.layer or 0).block] for choose in (min, max))
    cross = any(CROSS_SEGMENT.search(site.name.removeprefix(site.block)) for site in own)
    text = "input_ids" in names
    table = _table(host) if text else None
    if text and table is None:
        return
    pools = getattr(host, "pooler", None) is not None
    left = modules[enclosing] if text and enclosing != path else last if pools or not text else None
    way = Way(names, table, None if text else first, left)
    inside = [site for site in parts if site.name.startswith(f"{path}.") or not path]
    way = replace(way, positions=_positions(inside)) if text else replace(way, leading=_leading(inside))
    yield Site(
        name=path,
        kind="input",
        type="input",
        role=INPUT_ROLES[1] if cross else INPUT_ROLES[0],
        layer=None,
        module=host,
        tensor="",
        op=INPUT,
        shape=(widths.pop() if table is None else _width(table),),
        input=way,
    )


def _enclosing(blocks: list[str], modules: Mapping[str, nn.Module]) -> str:
    """Path of the innermost module that is called and holds all of these blocks."""
    path = blocks[0]
    while path and not all(block.startswith(f"{path}.") for block in blocks):
        path = path.rpartition(".")[0]
    while path and (
        NUMBERED_SEGMENT.fullmatch(path.rpartition(".")[2]) or isinstance(modules[path], (nn.ModuleList, nn.Sequential))
    ):
        path = path.rpartition(".")[0]
    return path


def _host(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Path of the module that runs a stack: it takes token ids or vectors, or is the innermost of those around it."""
    innermost = path
    while True:
        names = _arguments(modules[path]) if path in modules else ()
        if "input_ids" in names:
            return path if {"inputs_embeds", "attention_mask"} <= set(names) else None
        if not path or any(name in names for name in _SIGNALS):
            return innermost
        path = path.rpartition(".")[0]


def _arguments(module: nn.Module) -> tuple[str, ...]:
    base = getattr(type(module), "_finegraft_base", type(module))
    return tuple(inspect.signature(inspect.unwrap(base.forward)).parameters)[1:]


def _table(host: nn.Module) -> nn.Module | None:
    """The embedding that a model of Transformers looks token ids up in."""
    try:
        table = host.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return table if isinstance(table, nn.Module) and op_for(table) is not None else None


def _width(table: nn.Module) -> int:
    weight: Any = table.weight
    return int(weight.shape[-1])


def _leading(inside: list[Site]) -> int:
    tokens = [site for site in inside if site.kind == "tensor" and _CLASS_TOKEN.fullmatch(site.tensor)]
    return sum(site.shape[-2] if len(site.shape) > 1 else 1 for site in tokens)


def _positions(inside: list[Site]) -> int | None:
    for site in inside:
        if site.type == "embedding" and not site.block and _POSITIONS.search(site.name.rpartition(".")[2]):
            offset = getattr(site.module, "padding_idx", None)
            return site.shape[0] - (0 if offset is None else int(offset) + 1)
    return None
