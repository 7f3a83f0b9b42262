"""Finding d90: the search over numbers, and the runs that it makes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from finegraft.analysis import dimension as dimension_module
from finegraft.analysis.bisection import smallest_enough
from finegraft.analysis.dimension import conclusion, dimension_table, intrinsic_dimension
from finegraft.analysis.repeated import FinishedRun
from finegraft.errors import RecipeError
from finegraft.run.config import TuneConfig
from finegraft.run.config_file import as_config
from finegraft.train.interruption import TrainingInterrupted
from tests.analysis.conftest import Configure

PARAMETERS = 5000


@pytest.mark.parametrize("true", [1, 2, 3, 15, 16, 17, 64, 100, 999, 1000])
@pytest.mark.parametrize("start", [1, 16, 1000])
def test_the_smallest_number_is_found_exactly_when_asked_to(true: int, start: int) -> None:
    found = smallest_enough(lambda n: n >= true, start=start, factor=4, most=1000, resolution=1 + 1e-9)
    assert (found.number, found.below) == (true, true - 1)
    assert len(found.tried) == len(dict(found.tried)) <= 2 * math.log2(1000)


def test_the_resolution_ends_the_search_early() -> None:
    found = smallest_enough(lambda n: n >= 700, start=16, factor=4, most=10**6, resolution=1.25)
    assert found.number is not None and found.below < 700 <= found.number <= 1.25 * found.below


def test_a_goal_out_of_reach_is_told_after_the_largest_number() -> None:
    found = smallest_enough(lambda n: False, start=16, factor=4, most=100, resolution=1.5)
    assert (found.number, found.below) == (None, 100)
    assert [number for number, _ in found.tried] == [16, 64, 100]


@pytest.mark.parametrize(
    "settings", [{"start": 0}, {"start": 2000}, {"factor": 1.0}, {"resolution": 1.0}, {"factor": math.nan}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="has to lie between 1 and|are numbers above 1"):
        smallest_enough(lambda n: True, **{"start": 16, "factor": 4, "most": 1000, "resolution": 1.25} | settings)


class Trainings:
    """Stands in for training: a score that rises with the dimension; folders remember what has run."""

    def __init__(self, *, half_at: float, perplexity: bool = False, stop_after: int | None = None) -> None:
        self.half_at, self.perplexity, self.stop_after = half_at, perplexity, stop_after
        self.trained: list[str] = []

    def __call__(self, config: TuneConfig) -> FinishedRun:
        out = Path(config.out)
        file = out / "metrics.json"
        if not file.exists():
            if self.stop_after is not None and len(self.trained) >= self.stop_after:
                raise TrainingInterrupted("interrupted", step=1)
            self.trained.append(out.name)
            out.mkdir(parents=True)
            file.write_text(json.dumps(self.metrics(config)))
        return FinishedRun(out, json.loads(file.read_text()))

    def metrics(self, config: TuneConfig) -> dict[str, Any]:
        projected = isinstance(config.method, dict)
        dimension = config.method["dimension"] if isinstance(config.method, dict) else math.inf
        gain = dimension / (dimension + self.half_at) if projected else 1.0 if config.method == "full" else 0.2
        before, after = (100.0, 100.0 - 60 * gain) if self.perplexity else (0.5, 0.5 + 0.4 * gain)
        name = "perplexity" if self.perplexity else "accuracy"
        common = {"headline": name, "higher_is_better": not self.perplexity, "trainable_parameters": PARAMETERS}
        return {**common, "before": {name: before}, "after": {name: after}}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(**settings: Any) -> Trainings:
        trainings = Trainings(**settings)
        monkeypatch.setattr(dimension_module, "run_once", trainings)
        monkeypatch.setattr(dimension_module, "resolve", lambda method: method)
        return trainings

    return made


@pytest.mark.parametrize("perplexity", [False, True])
def test_it_is_the_dimension_that_reaches_nine_tenths_of_the_gain(
    stand_in: Any, configure: Configure, perplexity: bool
) -> None:
    stand_in(half_at=30.0, perplexity=perplexity)
    told: list[str] = []
    found = intrinsic_dimension(configure(), resolution=1.01, tell=told.append)
    assert found.dimension is not None and found.dimension / 270 == pytest.approx(1, abs=0.011)
    facts = json.loads((found.out / "intrinsic-dimension.json").read_text())
    assert facts == found.facts
    assert facts["target"] == pytest.approx(46.0 if perplexity else 0.86)
    assert len(told) == 1 + len(facts["points"])
    assert f"{found.dimension:,} dimensions reach 90%" in conclusion(facts)
    assert "<circle" in (found.out / "intrinsic-dimension.html").read_text()
    assert dimension_table(facts).row_count == len(facts["points"]) + 2


def test_interrupted_it_goes_on_to_the_same_result(stand_in: Any, configure: Configure) -> None:
    stand_in(half_at=30.0)
    whole = intrinsic_dimension(configure(out="whole"))
    first = stand_in(half_at=30.0, stop_after=3)
    with pytest.raises(TrainingInterrupted):
        intrinsic_dimension(configure(out="cut"))
    rest = stand_in(half_at=30.0)
    assert intrinsic_dimension(configure(out="cut")).facts == whole.facts
    assert len(first.trained) == 3 and not set(first.trained) & set(rest.trained)
    again = stand_in(half_at=30.0, stop_after=0)
    assert intrinsic_dimension(configure(out="cut")).facts == whole.facts
    assert again.trained == []


def test_the_gain_may_be_counted_from_the_head_or_a_number(stand_in: Any, configure: Configure) -> None:
    stand_in(half_at=30.0)
    from_head = intrinsic_dimension(configure(), baseline="head").facts
    assert (from_head["baseline"], from_head["target"]) == (pytest.approx(0.58), pytest.approx(0.868))
    assert intrinsic_dimension(configure(), baseline=0.7).facts["target"] == pytest.approx(0.88)


def test_the_method_s_settings_are_kept_and_its_rate_is_not_that_of_full(
    monkeypatch: pytest.MonkeyPatch, stand_in: Any, configure: Configure
) -> None:
    seen: list[TuneConfig] = []
    trainings = stand_in(half_at=30.0)
    monkeypatch.setattr(dimension_module, "run_once", lambda config: seen.append(config) or trainings(config))
    method = {"name": "intrinsic-dimension", "matrix": "dense", "dimension": 7}
    intrinsic_dimension(configure(method=method), full_lr=1e-3)
    assert (seen[0].method, seen[0].train.lr) == ("full", 1e-3)
    assert seen[1].method == {"name": "intrinsic-dimension", "matrix": "dense", "dimension": 16}
    assert seen[1].train.lr == 0.02


def test_a_dimension_that_is_never_enough_is_told(stand_in: Any, configure: Configure) -> None:
    stand_in(half_at=1e9)
    found = intrinsic_dimension(configure())
    assert found.dimension is None
    assert conclusion(found.facts).startswith("no dimension up to 5,000 reaches 90%")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "share is a part of the gain"),
        ({"baseline": "tail"}, "baseline is a number or one of untrained, head"),
        ({"baseline": 0.95}, "no better than the baseline"),
        ({"start": 10**6}, "has to lie between 1 and"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    stand_in: Any, configure: Configure, settings: dict[str, Any], message: str
) -> None:
    stand_in(half_at=30.0)
    with pytest.raises(RecipeError, match=message):
        intrinsic_dimension(configure(), **settings)


@pytest.mark.parametrize(
    "settings", [{"factor": 1.0}, {"factor": math.inf}, {"start": 8, "most": 4}, {"resolution": 0.5}]
)
def test_a_grid_that_goes_nowhere_is_refused_before_anything_is_trained(
    configure: Configure, settings: dict[str, Any]
) -> None:
    config = configure()
    with pytest.raises(RecipeError, match="has to lie between 1 and|are numbers above 1"):
        intrinsic_dimension(config, **settings)
    assert not Path(as_config(config).out).exists()
