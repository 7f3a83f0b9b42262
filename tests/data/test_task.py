"""Settings of a task: defaults by kind, and what is refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from finegraft.data.task import Data, Task


def test_columns_left_out_get_the_defaults_of_their_kind():
    task = Task(kind="classification", text="sentence")
    assert (task.text, task.text_pair, task.label, task.tokens) == ("sentence", None, "label", None)
    pair = Task(kind="sentence-embedding")
    assert (pair.text, pair.text_pair, pair.score) == ("text", "text_pair", "score")


def test_a_task_survives_its_own_dump():
    for kind in ("classification", "regression", "causal-lm", "token-classification", "image-classification"):
        task = Task(kind=kind)
        assert Task(**task.model_dump()) == task


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"kind": "classification", "image": "photo"}, "image has no meaning"),
        ({"kind": "classification", "stride": 4}, "stride has no meaning"),
        ({"kind": "regression", "score_scale": 5}, "score_scale has no meaning"),
        ({"kind": "causal-lm", "max_length": 64, "stride": 65}, "larger than the block"),
        ({"kind": "poetry"}, "causal-lm"),
        ({"kind": ["causal-lm"]}, "causal-lm"),
        ({"kind": "causal-lm", "column": "text"}, "column"),
    ],
)
def test_contradictory_or_unknown_settings_are_refused(settings, part):
    with pytest.raises(ValidationError, match=part):
        Task(**settings)


def test_a_source_may_be_a_path():
    assert Data(eval=Path("a") / "b.csv").eval == str(Path("a") / "b.csv")
