"""A base with a graft written into it, as a plain folder of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finegraft.errors import RecipeError
from finegraft.grafting import merge
from finegraft.run.trained import load_trained
from finegraft.train.checkpoint import complete_or_absent


def write_merged(base: str, graft_path: str | Path, out: str | Path) -> Path:
    """Merges a graft into its base and saves the result, which loads without finegraft.

    Args:
        base: the base model: hub id, local folder, or ``minilm``.
        graft_path: folder of a graft, or of the run that made it.
        out: a folder that does not exist yet, or is empty.

    Returns:
        ``out``, with configuration, weights, and tokenizer or image processor.

    Raises:
        BaseMismatch: another base than the graft was made for.
        NotMergeable: a change that no weight can express.
        RecipeError: ``out`` is in use.
        StoreError: a graft that cannot be read, or a disk that is full.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} exists and is not empty; choose another folder")
    trained = load_trained(graft_path, base=base)
    merge(trained.model)
    model: Any = trained.model.encoder if trained.task.kind == "sentence-embedding" else trained.model
    with complete_or_absent(folder) as partial:
        model.save_pretrained(partial)
        if hasattr(trained.processor, "save_pretrained"):
            trained.processor.save_pretrained(partial)
    return folder
