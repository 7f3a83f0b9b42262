"""The examples run as they are written, only shorter."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from finegraft.run.config_file import load_config
from finegraft.run.tune import tune

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ["train.steps=2", "train.batch_size=4", "data.limit=16", "train.precision=fp32"]


@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.yaml"))])
def test_a_configuration_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    result = tune(load_config(EXAMPLES / name, [*SHORT, f"out={tmp_path / 'run'}"]))
    assert result.metrics["steps"] == 2
    assert (result.out / "report.html").is_file()


def test_the_loop_of_one_s_own_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "own_loop.py"))
    names["main"]()
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"^    (\w.*)$", names["__doc__"], re.M)
    assert len(printed) == len(said) == 5
    for line, expected in zip(printed, said, strict=True):
        (name, score), (name_said, score_said) = (
            re.match(r"(.*?)\s+([\d.]+)", text).groups() for text in (line, expected)
        )
        assert name == name_said
        assert float(score) == pytest.approx(float(score_said), abs=0.05)
    assert printed[2].rsplit("  ")[-1] == said[2].rsplit("  ")[-1]
