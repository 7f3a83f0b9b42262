"""An ordered, searchable collection of sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from rich.tree import Tree

from finegraft.errors import SiteError
from finegraft.locate import query, tree
from finegraft.locate.site import Site


class Sites(Sequence[Site]):
    """Sites in the order of the model; iterate, index by position or name, narrow with :meth:`where`.

    Args:
        sites: the sites.
        depths: number of blocks of each stack, worked out from the sites when not given.
    """

    def __init__(self, sites: Iterable[Site], *, depths: dict[str, int] | None = None) -> None:
        self._sites = tuple(sites)
        self._by_name = {site.name: site for site in reversed(self._sites)}
        self._depths = query.depths(self._sites) if depths is None else depths

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @overload
    def __getitem__(self, key: int | str) -> Site: ...
    @overload
    def __getitem__(self, key: slice) -> Sites: ...
    def __getitem__(self, key: int | str | slice) -> Site | Sites:
        if isinstance(key, slice):
            return Sites(self._sites[key], depths=self._depths)
        if isinstance(key, int):
            return self._sites[key]
        if key not in self._by_name:
            raise SiteError(f"no site is named {key!r}; {query.similar(key, self._sites)}")
        return self._by_name[key]

    def __contains__(self, item: object) -> bool:
        return item in self._by_name or item in self._sites

    def where(
        self,
        *,
        role: query.Wanted = None,
        layer: query.Wanted = None,
        name: query.Wanted = None,
        type: query.Wanted = None,
        kind: query.Wanted = None,
    ) -> Sites:
        """The sites that fit every given argument.

        Each argument is one element or a list of them, any of which may fit. ``"!x"`` leaves out what ``x``
        fits; ``"x?"`` may fit nothing. Any other element must fit at least one of the sites that the other
        arguments leave, so that a query never silently changes less than it says.

        Args:
            role: such as ``"q"``; ``"attn"``, ``"ffn"`` and ``"attention"`` ask for sublayers and attention
                calls.
            layer: block index, or ``"0-3"``, ``"first:2"``, ``"last:2"``, ``"first:50%"`` (of each stack, rounded
                down but at least one), ``"even"``, ``"odd"``.
            name: a glob over whole names (``"encoder.layer.*.query"``), or after ``"re:"`` a regular
                expression that is searched for.
            type: linear, conv, embedding, norm, tensor, sublayer, attention or input.
            kind: layer, tensor, sublayer, attention or input. By default layers and tensors, and what ``role`` or
                ``type`` ask for by name.

        Raises:
            SiteError: an element fits nothing, or no site fits them all.
        """
        wanted = {"role": role, "layer": layer, "name": name, "type": type, "kind": kind}
        return Sites(query.select(self._sites, wanted, self._depths), depths=self._depths)

    def tree(self, *, title: str = "model") -> Tree:
        """Layers and bare tensors under their modules, with types, roles, shapes and parameter counts."""
        return tree.tree(self._sites, title=title)

    def __repr__(self) -> str:
        lines = "".join(f"\n  {site!r}" for site in self._sites[:20])
        return f"Sites({len(self)}:{lines}{' ...' if len(self) > 20 else ''})"
