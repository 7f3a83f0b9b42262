"""Write docs/methods.md and docs/kinds.md from the catalogue and from the kinds themselves.

python docs/write_reference.py           # write
python docs/write_reference.py --check   # say which page is not up to date, and fail
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from finegraft.deltas.delta import Delta
from finegraft.recipe import Part, Recipe, Spec
from finegraft.registry import controllers, inits, kinds, methods

FOLDER = Path(__file__).parent
BY = "Written by `make reference` from the code; not by hand."


def methods_page() -> str:
    """Every method: what it is made of, its rate, its paper, and where it differs from that."""
    rows = [_method(name, methods[name]) for name in methods]
    head = (
        f"# Methods\n\n{BY} `finegraft methods show NAME` prints a recipe whole.\n\n"
        "Rates are for AdamW on small models, unless the recipe says otherwise.\n"
    )
    return "\n".join([head, *_table(("method", "made of", "trains with", "from", "note"), rows), ""])


def _method(name: str, recipe: Recipe) -> tuple[str, ...]:
    acting = [type(one).kind for one in recipe.control]
    made_of = "; ".join(map(_part, recipe.parts)) or "the head alone"
    source = recipe.source
    paper = "" if source is None else f"[{source.title}, {source.year}]({source.url})"
    rate = f"{recipe.train.optimizer}, {recipe.train.lr:g}"
    return f"`{name}`", made_of, ", ".join([rate, *acting]), paper, recipe.note


def _part(part: Part) -> str:
    where = {key: value for key, value in part.where.model_dump(exclude_none=True).items()}
    places = ", ".join(f"{key} {_listed(value)}" for key, value in where.items()) or "everywhere"
    changes = " then ".join(f"`{delta.kind}`" for delta in part.what)
    chosen = "" if part.select is None else f" ({part.select.unit} by {part.select.score})"
    return f"{changes}{chosen} on {places}"


def _listed(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def kinds_page() -> str:
    """Every kind of change, controller and start of factors, with settings and defaults."""
    head = f"# Kinds, controllers, starts\n\n{BY} Of the settings, docstrings say more.\n"
    changes = [
        (f"`{n}`", _first(k), ", ".join(k.on), "yes" if _merges(k) else "no", _settings(k)) for n, k in _of(kinds)
    ]
    acting = [(f"`{n}`", _first(k), _settings(k)) for n, k in _of(controllers)]
    starts = [(f"`{n}`", _first(f)) for n, f in _of(inits)]
    return "\n".join(
        [
            head,
            "## Kinds of change\n",
            *_table(("kind", "change", "sites", "merges", "settings"), changes),
            "\n## Controllers: what acts while a graft trains\n",
            *_table(("kind", "acts so", "settings"), acting),
            "\n## Starts of low-rank factors\n",
            *_table(("init", "start"), starts),
            "",
        ]
    )


def _of(registry: Iterable[str]) -> Iterator[tuple[str, object]]:
    return ((name, registry[name]) for name in sorted(registry))  # type: ignore[index]


def _merges(kind: type[Delta]) -> bool:
    return kind.weight is not Delta.weight or kind.bias is not Delta.bias


def _first(thing: object) -> str:
    """The first paragraph of a docstring, as one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def _settings(kind: type[Spec]) -> str:
    return ", ".join(
        name if field.is_required() else f"{name} {field.get_default(call_default_factory=True)!r}"
        for name, field in kind.model_fields.items()
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


PAGES = {"methods.md": methods_page, "kinds.md": kinds_page}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Reference pages of methods and kinds.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a page is not up to date")
    options = parser.parse_args(arguments)
    stale = [name for name, page in PAGES.items() if page() != _read(FOLDER / name)]
    for name in stale:
        if options.check:
            print(f"docs/{name} is not what the code says: run make reference", file=sys.stderr)
        else:
            (FOLDER / name).write_text(PAGES[name](), encoding="utf-8")
    return int(options.check and bool(stale))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
