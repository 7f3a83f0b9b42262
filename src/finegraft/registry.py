"""Named things (kinds, scores, controllers, methods ...) that packages add by decorator or entry point."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from finegraft.errors import RecipeError

T = TypeVar("T")


def nearest(name: str, allowed: list[str]) -> str:
    """A sentence fragment that suggests the closest allowed name, or lists all of them."""
    close = difflib.get_close_matches(name.lower(), allowed, n=5, cutoff=0.5)
    swapped = [other for other in close if sorted(other) == sorted(name.lower())]  # a slip of the fingers
    listing = ", ".join(sorted(allowed))
    return f"did you mean {(swapped or close)[0]!r}? (known: {listing})" if close else f"known: {listing}"


class Registry(Generic[T]):
    """A table of named entries, filled on first use.

    Args:
        what: the noun used in errors, such as ``"kind"``.
        package: the package whose modules register the built-in entries when imported.
        group: the entry-point group through which other packages add theirs.
    """

    def __init__(self, what: str, *, package: str, group: str) -> None:
        self.what, self._package, self._group = what, package, group
        self._entries: dict[str, T] = {}
        self._filled = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an entry under ``name``; a taken name is an error."""

        def file(entry: T) -> T:
            taken = self._entries.get(name)
            if taken is not None and _origin(taken) != _origin(entry):
                raise RecipeError(f"{self.what} {name!r} is already registered by {_origin(taken)}")
            self._entries[name] = entry
            return entry

        return file

    def filed(self, name: str) -> bool:
        """Whether ``name`` is taken so far; unlike ``in``, this does not fill the table."""
        return name in self._entries

    def remove(self, name: str) -> None:
        """Forget an entry that was registered by hand."""
        del self._entries[name]

    def _fill(self) -> None:
        if self._filled:
            return
        self._filled = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        for point in entry_points(group=self._group):
            self.register(point.name)(point.load())

    def __getitem__(self, name: str) -> T:
        self._fill()
        if name not in self._entries:
            raise RecipeError(f"unknown {self.what} {name!r}; {nearest(name, list(self._entries))}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(sorted(self._entries))

    def items(self) -> list[tuple[str, T]]:
        """All entries, sorted by name."""
        return [(name, self._entries[name]) for name in self]


def _origin(entry: object) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', repr(entry))}"


kinds: Registry = Registry("kind", package="finegraft.deltas", group="finegraft.kinds")
inits: Registry = Registry("init", package="finegraft.inits", group="finegraft.inits")
quantisers: Registry = Registry("quantiser", package="finegraft.quantised", group="finegraft.quantisers")
controllers: Registry = Registry("controller", package="finegraft.control", group="finegraft.controllers")
scores: Registry = Registry("score", package="finegraft.select", group="finegraft.scores")
optimizers: Registry = Registry("optimizer", package="finegraft.train.updates", group="finegraft.optimizers")
methods: Registry = Registry("method", package="finegraft.catalogue", group="finegraft.methods")
