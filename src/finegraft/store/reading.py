"""Loading a graft: everything is checked before anything is handed out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from finegraft.errors import StoreError
from finegraft.store import folder
from finegraft.store.manifest import Manifest, decode
from finegraft.store.tensors_file import pickle_kind, pickle_refusal, read_tensors

T = TypeVar("T")

ATTEMPTS = 20  # how often a graft that is being replaced right now is tried before the last time
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Manifest]:
    """The tensors (on the CPU, by sorted name) and the manifest of the graft in the folder ``path``.

    Both are checked against the digests recorded when they were written. These tell accidents from the
    original, not an attacker who recomputes them; nothing in a graft is ever executed either way.

    Raises:
        StoreError: no graft there, a newer format, a file that is missing, truncated, changed, a pickle or
            a link to elsewhere, or names that are refused.
    """
    return _while_it_holds_still(_existing_folder(path), _read)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest alone, for a look at a graft without reading its tensors.

    Raises:
        StoreError: as `read`, as far as it concerns ``graft.json``.
    """
    return _while_it_holds_still(_existing_folder(path), _manifest)


def size(path: str | os.PathLike[str]) -> int:
    """Bytes of a graft on disk: tensors, manifest and model card.

    Raises:
        StoreError: no graft there.
    """
    return _while_it_holds_still(_existing_folder(path), _size)


def _while_it_holds_still(location: Path, look: Callable[[Path], T]) -> T:
    """What ``look`` finds in the folder; it looks again if a save ran meanwhile and made it fail."""
    for _ in range(ATTEMPTS):
        state = _state(location)
        try:
            _require_graft(location)
            return look(location)
        except StoreError:
            if _state(location) == state:
                raise
    return look(location)


def _read(location: Path) -> tuple[dict[str, Tensor], Manifest]:
    manifest = _manifest(location)
    path = folder.regular_file(location, folder.TENSORS)
    return read_tensors(path, sha256=manifest.tensors_sha256), manifest


def _size(location: Path) -> int:
    total = 0
    for name in folder.FILES:
        if name == folder.CARD and not folder.locate(location, name).is_file():
            continue  # a graft is whole without its card
        path = folder.regular_file(location, name)
        try:
            total += path.stat().st_size
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error}") from error
    return total


def _manifest(location: Path) -> Manifest:
    path = folder.regular_file(location, folder.MANIFEST)
    try:
        return decode(path.read_bytes(), path)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def _state(location: Path) -> list[tuple[str, tuple[int, ...] | None]]:
    """Identity of the files of a graft: another one means that a save came in between."""
    state: list[tuple[str, tuple[int, ...] | None]] = []
    for name in (folder.MANIFEST, folder.TENSORS):
        path = folder.locate(location, name)
        try:
            found = path.stat()
        except OSError:
            state.append((str(path), None))
        else:
            state.append((str(path), (found.st_ino, found.st_size, found.st_mtime_ns)))
    return state


def _existing_folder(path: str | os.PathLike[str]) -> Path:
    location = folder.as_path(path)
    try:
        if location.is_dir():
            return location.resolve()
        exists = location.exists()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise StoreError(f"{path!r} cannot be read: {error}") from error
    if not exists:
        raise StoreError(f"no graft at {location}: there is no such folder")
    raise StoreError(_what_a_file_is(location))


def _require_graft(location: Path) -> None:
    if os.path.lexists(folder.locate(location, folder.MANIFEST)):
        return
    names = sorted(entry.name for entry in location.iterdir())
    if "adapter_config.json" in names:
        raise StoreError(f"{location} is a PEFT adapter (it has adapter_config.json), not a finegraft graft")
    if folder.TENSORS in names:
        raise StoreError(f"{location} has no {folder.MANIFEST}: the graft is incomplete")
    pickled = next((name for name in names if Path(name).suffix in PICKLE_SUFFIXES), None)
    if pickled:
        raise StoreError(pickle_refusal(location / pickled, "a pickle, by its name"))
    found = f"it has {', '.join(names[:3])}" if names else "it is empty"
    raise StoreError(f"{location} is not a graft: it has no {folder.MANIFEST} ({found})")


def _what_a_file_is(path: Path) -> str:
    if not path.is_file():
        return f"{path} is not a folder; a graft is one"
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        return f"{path} cannot be read: {error}"
    kind = None if start[8:9] == b"{" else pickle_kind(start)
    if kind:
        return pickle_refusal(path, kind)
    return f"{path} is a file; give the folder that holds {folder.TENSORS} and {folder.MANIFEST}"
