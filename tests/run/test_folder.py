"""The folder of a run: what may be replaced, and what is never touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from finegraft.errors import RecipeError, StoreError
from finegraft.run.config import TuneConfig
from finegraft.run.folder import RunFolder
from tests.run.conftest import Configure

FOREIGN = ("graft/precious.py", "start.json", "config.yaml", "metrics.json", "checkpoint-3/notes.txt")


def made_run(folder: Path, configure: Configure) -> RunFolder:
    run = RunFolder(folder)
    run.clear()
    run.write_config(TuneConfig.model_validate(configure()))
    run.write_start({"before": {"accuracy": 0.5}, "precision": "fp32"})
    return run


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_no_run_made_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    put(tmp_path, name)
    with pytest.raises(RecipeError, match="in use, and not by a run of finegraft"):
        RunFolder(tmp_path).require_free(overwrite=overwrite)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "run")
    for path in (tmp_path / "run", tmp_path / ("n" * 5000)):
        with pytest.raises(RecipeError, match="choose another out:"):
            RunFolder(path).require_free(overwrite=True)


def test_an_empty_folder_and_one_of_a_killed_start_are_free(tmp_path: Path) -> None:
    RunFolder(tmp_path).require_free(overwrite=False)
    put(tmp_path, ".config.yaml.partial")
    RunFolder(tmp_path).require_free(overwrite=False)


def test_replacing_a_run_removes_only_what_it_wrote(tmp_path: Path, configure: Configure) -> None:
    run = made_run(tmp_path, configure)
    put(tmp_path, "graft/graft.json", "graft/precious.py", "last-good/graft.json", "checkpoint-3/trained.safetensors")
    put(tmp_path, "checkpoint-3/notes.txt", "checkpoint-4/checkpoint.json", "metrics.json", "notes.txt")
    run.require_free(overwrite=True)
    run.clear()
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {"config.yaml", "graft/precious.py", "checkpoint-3/notes.txt", "notes.txt"}


def test_a_damaged_start_is_an_error(tmp_path: Path, configure: Configure) -> None:
    run = made_run(tmp_path, configure)
    good = run.start.read_bytes()
    for place in [place for place, byte in enumerate(good) if not chr(byte).isspace()]:
        run.start.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(StoreError, match="--overwrite"):
            run.read_start()
