"""Blocks and stacks: which repeated part of the network a path lies in, and its depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from finegraft.locate.roles import NUMBERED_SEGMENT

_ATTENTION_ROLES = frozenset({"q", "k", "v", "o", "qkv"})
_FFN_ROLES = frozenset({"up", "gate", "down", "router"})


@dataclass(frozen=True)
class Block:
    """One block of a stack: its path, its index from the input, and the name of its stack."""

    path: str
    index: int
    stack: str


def numbered_ancestors(path: str) -> Iterator[str]:
    """Proper prefixes of a path that end in a number, outermost first."""
    parts = path.split(".")
    for length in range(1, len(parts)):
        if NUMBERED_SEGMENT.fullmatch(parts[length - 1]):
            yield ".".join(parts[:length])


class Blocks:
    """The blocks of a model, worked out from where its attention and feed-forward layers lie.

    A block is the innermost numbered module that holds both attention and feed-forward layers, so that T5's
    ``block.0.layer.1`` belongs to block 0 and the stages of a hierarchical network are no blocks. Where there
    are none, as in a ResNet, it is the outermost numbered module. Blocks whose paths differ only in their
    numbers form one stack; consecutive stages (``layer1.0``, ``layer1.1``, ``layer2.0``) are counted through.

    Args:
        roles: pairs of a site's path and its role, in the order of the model.
    """

    def __init__(self, roles: Iterable[tuple[str, str]]) -> None:
        roles = list(roles)
        attention = {a for path, role in roles if role in _ATTENTION_ROLES for a in numbered_ancestors(path)}
        ffn = {a for path, role in roles if role in _FFN_ROLES for a in numbered_ancestors(path)}
        self._containers = {outer for inner in attention & ffn for outer in numbered_ancestors(inner)}
        self._complete = (attention & ffn) - self._containers
        found = dict.fromkeys(self._path_of(path) for path, _ in roles)
        self._blocks = {block.path: block for block in _numbered(path for path in found if path)}

    def _path_of(self, path: str) -> str:
        ancestors = list(numbered_ancestors(path))
        complete = [a for a in ancestors if a in self._complete]
        return next(iter(complete + [a for a in ancestors if a not in self._containers]), "")

    def of(self, path: str) -> Block | None:
        """The block that a path lies in, ``None`` outside of any stack."""
        return self._blocks.get(self._path_of(path))


def _numbered(paths: Iterable[str]) -> Iterator[Block]:
    stacks: dict[str, list[str]] = {}
    for path in paths:
        stacks.setdefault(re.sub(r"\d+", "#", path), []).append(path)
    for stack, members in stacks.items():
        own = [re.split(r"(\d+)(?!.*\d)", path) for path in members]
        one_list = len({before for before, *_ in own}) == 1
        for running, (path, (_, number, *_)) in enumerate(zip(members, own, strict=True)):
            yield Block(path, int(number) if one_list else running, stack)
