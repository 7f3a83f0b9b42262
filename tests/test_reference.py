"""The reference pages say what the code says."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_pages_of_methods_and_kinds_are_up_to_date(capsys):
    spec = importlib.util.spec_from_file_location("write_reference", DOCS / "write_reference.py")
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    assert written.main(["--check"]) == 0, capsys.readouterr().err
