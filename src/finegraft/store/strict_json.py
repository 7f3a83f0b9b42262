"""JSON without its loose ends: no NaN, no key twice, no bottomless nesting, no broken Unicode."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64


def parse(content: bytes) -> Any:
    """The value in ``content``.

    Raises:
        ValueError: not JSON in UTF-8, or JSON that `require_plain` refuses or that says something twice.
    """
    try:
        document = json.loads(content.decode(), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    require_plain(document)
    return document


def require_plain(document: Any) -> None:
    """Return if ``document``, made of dicts, lists, text and numbers, can be written as JSON and read back.

    Raises:
        ValueError: naming the first number that is not finite, text that is not Unicode, or deep nesting.
    """
    pending: list[tuple[str, Any, int]] = [("", document, 0)]
    while pending:
        where, value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels at {where[:60]}...")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where or 'it'} is {value}, which JSON cannot hold: leave it out or use null")
        if isinstance(value, str):
            _require_unicode(value, where)
        elif isinstance(value, dict):
            pending += [(key, key, depth) for key in value]
            pending += [(f"{where}.{key}" if where else key, child, depth + 1) for key, child in value.items()]
        elif isinstance(value, list):
            pending += [(f"{where}[{position}]", child, depth + 1) for position, child in enumerate(value)]


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where!r} is {text[:40]!r}, which is not valid Unicode") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
