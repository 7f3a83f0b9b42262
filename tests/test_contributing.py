"""The walk-through of CONTRIBUTING.md does what it says."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from finegraft.catalogue.rows import LINEAR, method
from finegraft.registry import kinds, methods
from finegraft.testing import check_kind

GUIDE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def _block(start: str) -> str:
    found = re.search(rf"```{re.escape(start)}.*?\n```", GUIDE, re.DOTALL)
    assert found, f"CONTRIBUTING.md has no block that starts with {start!r}"
    return found.group().split("\n", 1)[1].removesuffix("\n```")


@pytest.fixture
def hadamard(tmp_path):
    file = tmp_path / "hadamard.py"
    file.write_text(_block('python title="hadamard.py"'))
    spec = importlib.util.spec_from_file_location("walkthrough_hadamard", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield file
    finally:
        del sys.modules[spec.name]
        kinds.remove("hadamard")


def test_the_kind_is_short_and_keeps_the_laws(hadamard):
    assert len(hadamard.read_text().splitlines()) <= 40
    check_kind("hadamard")


def test_the_laws_catch_a_kind_that_does_not_start_as_the_identity(hadamard, monkeypatch):
    def everything_at_one(self, site, rng):
        return {name: torch.ones(shape) for name, shape in self.shapes(site).items()}

    monkeypatch.setattr(kinds["hadamard"], "initial", everything_at_one)
    with pytest.raises(AssertionError, match="identity"):
        check_kind("hadamard")


def test_the_row_files_a_method(hadamard):
    exec(_block("python\nmethod("), {"method": method, "LINEAR": LINEAR})
    try:
        assert methods["hadamard"].parts[0].what[0].rank == 8
    finally:
        methods.remove("hadamard")
