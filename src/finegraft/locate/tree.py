"""Sites as a tree of nested modules, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from finegraft.locate.roles import NUMBERED_SEGMENT
from finegraft.locate.site import Site


@dataclass
class _Node:
    """A module on the way to sites; the site that ends here, if any."""

    children: dict[str, _Node] = field(default_factory=dict)
    site: Site | None = None

    @property
    def parameters(self) -> int:
        own = self.site.num_parameters if self.site else 0
        return own + sum(child.parameters for child in self.children.values())

    @property
    def signature(self) -> Any:
        """Equal for subtrees that look alike."""
        site = self.site
        own = site and (site.type, site.role, site.shape, site.num_parameters)
        return own, tuple((name, child.signature) for name, child in self.children.items())


def tree(sites: Iterable[Site], *, title: str) -> Tree:
    """Layers and bare tensors under their modules; runs of like blocks are shown once."""
    root = _Node()
    for site in sites:
        if site.kind in ("layer", "tensor"):
            node = root
            for segment in site.name.split("."):
                node = node.children.setdefault(segment, _Node())
            node.site = site
    shown = Tree(f"[bold]{escape(title)}[/bold]  {root.parameters:,} parameters")
    _show(root, shown, parent="")
    return shown


def _show(node: _Node, shown: Tree, *, parent: str) -> None:
    for names, child in _runs(node):
        label, child, last = _joined(names, child, parent)
        branch = shown.add(escape(label) + _facts(child, copies=len(names)))
        _show(child, branch, parent=last)


def _runs(node: _Node) -> list[tuple[list[str], _Node]]:
    """Children in order, neighbouring numbered ones that look alike taken together."""
    keyed = [
        (name, child, (child.signature if NUMBERED_SEGMENT.fullmatch(name) and child.children else name))
        for name, child in node.children.items()
    ]
    runs = [list(run) for _, run in groupby(keyed, key=lambda item: item[2])]
    return [([name for name, _, _ in run], run[0][1]) for run in runs]


def _joined(names: list[str], child: _Node, parent: str) -> tuple[str, _Node, str]:
    """The label of a run: ``layer.0 … layer.5``, or modules with a single child on one line."""
    if len(names) > 1:
        first, last = (f"{parent}.{name}" if parent else name for name in (names[0], names[-1]))
        return f"{first} … {last} ({len(names)} alike)", child, names[0]
    path, name = names[0], names[0]
    while child.site is None and len(child.children) == 1:
        ((name, below),) = child.children.items()
        path, child = f"{path}.{name}", below
    return path, child, name


def _facts(node: _Node, *, copies: int) -> str:
    if node.site is None:
        each = " each" if copies > 1 else ""
        return f"  [dim]{node.parameters:,}{each}[/dim]"
    site = node.site
    tied = f"  [dim]= {', '.join(name for name, _, _ in site.aliases)}[/dim]" if site.aliases else ""
    shape = "×".join(map(str, site.shape)) or "scalar"
    what = f"  [cyan]{site.type}[/cyan] [green]{site.role}[/green] {shape}"
    return f"{what}  [dim]{site.num_parameters:,}[/dim]{tied}"
