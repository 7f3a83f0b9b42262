"""The folder of a run: what lies in it, and whether a run may start or resume there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finegraft.errors import RecipeError, StoreError
from finegraft.run.config import TuneConfig, changed_keys
from finegraft.run.config_file import load_config
from finegraft.train.checkpoint import checkpoints


@dataclass(frozen=True)
class RunFolder:
    """Names in the folder of a run.

    A finished run holds ``graft/``, ``metrics.json``, ``recipe.yaml``, ``config.yaml`` and
    ``report.html``; an unfinished one ``config.yaml``, ``recipe.yaml``, ``start.json`` and checkpoints.

    Args:
        path: the folder; it need not exist.
    """

    path: Path

    @property
    def graft(self) -> Path:
        """The trained graft."""
        return self.path / "graft"

    @property
    def last_good(self) -> Path:
        """The graft as it was before training failed."""
        return self.path / "last-good"

    @property
    def metrics(self) -> Path:
        """Scores, sizes and times; written last, so that its presence means that the run finished."""
        return self.path / "metrics.json"

    @property
    def recipe(self) -> Path:
        """The recipe with every default and override resolved."""
        return self.path / "recipe.yaml"

    @property
    def config(self) -> Path:
        """The configuration as it was carried out."""
        return self.path / "config.yaml"

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.path / "report.html"

    @property
    def start(self) -> Path:
        """What was found out before the first step; only while a run is unfinished."""
        return self.path / "start.json"

    def checkpoint_to_resume(self, config: TuneConfig) -> Path:
        """The newest checkpoint of an unfinished run of this configuration.

        Raises:
            RecipeError: nothing to resume, a run that has finished, or another configuration.
        """
        if self.metrics.exists():
            raise RecipeError(f"the run in {self.path} has finished; there is nothing to resume. {_WAYS_ON}")
        found = checkpoints(self.path)
        if not found or not self.config.exists() or not self.start.exists():
            raise RecipeError(f"there is no interrupted run in {self.path}; run without --resume to start one")
        before = load_config(self.config)
        if keys := changed_keys(before, config):
            old, new = before.plain(), config.plain()
            listed = "; ".join(f"{key} was {_at(old, key)!r} and is {_at(new, key)!r}" for key in keys)
            raise RecipeError(
                f"the run in {self.path} was started with another configuration: {listed}. "
                f"Put it back to resume, or start another run: {_WAYS_ON}"
            )
        return found[-1]

    def require_free(self, *, overwrite: bool) -> None:
        """Returns if a new run may start here.

        Args:
            overwrite: whether an earlier run may be replaced.

        Raises:
            RecipeError: an earlier run is in the way.
        """
        if not overwrite and self.metrics.exists():
            raise RecipeError(f"{self.path} holds a finished run. {_WAYS_ON}")
        if not overwrite and checkpoints(self.path):
            raise RecipeError(f"{self.path} holds an interrupted run: continue it with --resume. {_WAYS_ON}")

    def clear(self) -> None:
        """Makes the folder, and removes an earlier run's files from it; other files are left alone.

        Raises:
            StoreError: the folder cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.remove_traces()
            for file in (self.metrics, self.report, self.recipe, self.config):
                file.unlink(missing_ok=True)
            for folder in (self.graft, self.last_good):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            raise StoreError(f"cannot write to {self.path}: {error.strerror}; choose another out:") from error

    def remove_traces(self) -> None:
        """Removes what only an unfinished run needs."""
        for checkpoint in checkpoints(self.path):
            shutil.rmtree(checkpoint)
        self.start.unlink(missing_ok=True)

    def write_config(self, config: TuneConfig) -> None:
        """Stores the configuration that is being carried out."""
        write_text(self.config, yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True))


_WAYS_ON = "Use another out:, or --overwrite to replace it"


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all.

    Raises:
        StoreError: the disk is full or the place cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, data: Any) -> None:
    """Writes data as JSON, completely or not at all."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def _at(data: dict[str, Any], key: str) -> Any:
    value: Any = data
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
