"""Finished runs as lines of JSON, so that a command can be stopped and given again at any time."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def digest(facts: Any) -> str:
    """What a run is known by: it changes with anything in ``facts``, which is plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by key; a last line that was cut off counts as none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["key"]] = row
    return found


def append(lines: Path, row: dict[str, Any]) -> None:
    """Add a finished run, on a line of its own even where the last one was cut off."""
    lines.parent.mkdir(parents=True, exist_ok=True)
    with open(lines, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
