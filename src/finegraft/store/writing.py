"""Saving a graft."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from finegraft.errors import StoreError
from finegraft.store import folder
from finegraft.store.manifest import Manifest, encode
from finegraft.store.tensors_file import digest, require_storable, write_tensors


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], manifest: Manifest, *, card: str) -> None:
    """Save a graft as the folder ``path``, replacing the graft that is there, if any.

    All or nothing: when this returns the new graft is on disk, and when it raises whatever was at ``path``
    is as it was. A process killed at any moment leaves one or the other, whole.

    Args:
        path: the folder; parents are made.
        tensors: by name; any strided tensors, on any device.
        manifest: what the graft is; ``tensors_sha256`` is filled in here.
        card: text of ``README.md``, such as from `finegraft.store.card`.

    Raises:
        StoreError: ``path`` holds something else, a tensor or value cannot be stored, or the disk is full.
    """
    wanted = folder.as_path(path)
    require_storable(tensors)
    encode(manifest)  # reject what JSON cannot hold before the disk is touched
    try:
        target = wanted.resolve()
        folder.require_replaceable(target)
        staging = folder.stage(target)
        try:
            _fill(staging, tensors, manifest, card)
            folder.commit(staging, target)
        except BaseException:
            folder.discard(staging)
            raise
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: text that is not Unicode
        reason = f"{error}. What was there is untouched"
        raise StoreError(f"the graft was not saved to {path}: {reason}") from error


def _fill(staging: Path, tensors: dict[str, Tensor], manifest: Manifest, card: str) -> None:
    (staging / folder.CARD).write_text(card, encoding="utf-8", newline="\n")
    write_tensors(staging / folder.TENSORS, tensors)
    # safetensors makes its file readable by this user only
    shutil.copymode(staging / folder.CARD, staging / folder.TENSORS)
    complete = manifest.model_copy(update={"tensors_sha256": digest(staging / folder.TENSORS)})
    (staging / folder.MANIFEST).write_bytes(encode(complete))
