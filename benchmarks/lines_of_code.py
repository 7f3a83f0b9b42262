"""How many lines each structured kind, start and controller takes: ``make loc``.

    python benchmarks/lines_of_code.py           # the table
    python benchmarks/lines_of_code.py --check   # exit status 1 where a limit is passed

What counts follows from the catalogue: the files of the kinds, inits and controllers in the recipes of the structured
methods, and the files of these rooms that they import. Left out are the pieces that every method stands on. Lines of
code are those with neither a comment, a docstring nor nothing; beside them stand all lines of the file.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import finegraft
from finegraft.recipe import Recipe
from finegraft.registry import inits, kinds, methods

PACKAGE = Path(finegraft.__file__).parent
ROOMS = ("deltas", "inits", "control")
FAMILIES = ("low_rank", "structured", "rank_budgets", "shared_factors", "compositions", "informed_starts")
GENERAL = (
    *(f"deltas.{name}" for name in ("delta", "full", "in_place", "bias")),
    *(f"control.{name}" for name in ("controller", "driver", "run", "batches", "processes")),
)
MEDIAN, TOTAL = 60, 3500


@dataclass(frozen=True)
class Counted:
    """Lines of one file.

    Attributes:
        name: of the module, under the package.
        kind: whether it holds a kind.
        code: lines of code.
        lines: all lines.
    """

    name: str
    kind: bool
    code: int
    lines: int


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    counted = [_counted(name) for name in sorted(modules())]
    width = max(len(one.name) for one in counted)
    for one in counted:
        print(f"{one.name:{width}}  {one.code:5} of {one.lines:5}{'' if one.kind else '  (no kind)'}")
    middle, total = median(one.code for one in counted if one.kind), sum(one.code for one in counted)
    print(f"\nmedian of kinds: {middle:g} lines of code (at most {MEDIAN})")
    print(f"total: {total:,} lines of code (at most {TOTAL:,}), {sum(one.lines for one in counted):,} lines")
    return int("--check" in given and (middle > MEDIAN or total > TOTAL))


def modules() -> set[str]:
    """Modules of the kinds, starts and controllers of all structured methods, and what they are made of."""
    found: set[str] = set()
    waiting = {piece for method in structured() for piece in _pieces(methods[method])}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= {other for other in _imported(name) if other not in found}
    return found


def structured() -> Iterator[str]:
    """Names of the methods in the catalogue's files of this family."""
    for family in FAMILIES:
        path = PACKAGE / "catalogue" / f"{family}.py"
        for node in ast.walk(ast.parse(path.read_text())) if path.exists() else ():
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "method":
                yield ast.literal_eval(node.args[0])


def _pieces(recipe: Recipe) -> Iterator[str]:
    for part in recipe.parts:
        for delta in part.what:
            yield from _own(type(delta).__module__)
            if getattr(delta, "init", None) in inits:
                yield from _own(inits[delta.init].draw.__module__)
    for controller in recipe.control:
        yield from _own(type(controller).__module__)


def _own(module: str) -> Iterator[str]:
    name = module.removeprefix("finegraft.")
    if name.startswith(tuple(f"{room}." for room in ROOMS)) and name not in GENERAL:
        yield name


def _imported(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_path(name).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finegraft."):
            yield from _own(str(node.module))


def _path(name: str) -> Path:
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def _counted(name: str) -> Counted:
    text = _path(name).read_text()
    module = importlib.import_module(f"finegraft.{name}")
    held = any(cls.__module__ == module.__name__ for _, cls in kinds.items())
    return Counted(name, held, len(_lines_of_code(text)), len(text.splitlines()))


def _lines_of_code(text: str) -> set[int]:
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    told: set[int] = set()
    for node in ast.walk(tree):
        for statement in node.body if isinstance(node, documented) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                told |= set(range(statement.lineno, statement.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return {number for number, line in lines if number not in told and line.strip() and line.strip()[0] != "#"}


if __name__ == "__main__":
    sys.exit(main())
