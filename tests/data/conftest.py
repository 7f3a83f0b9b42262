"""The real tokenizer and the data that travels with the repository."""

from pathlib import Path

import pytest

from finegraft.data.base import load_base
from finegraft.data.task import Task

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="session")
def minilm():
    """MiniLM with a head of two classes."""
    return load_base("minilm", Task(kind="classification"), labels=["0", "1"], seed=3)


@pytest.fixture(scope="session")
def stories():
    """The small language model of the repository."""
    return load_base(str(DATA / "stories260k"), Task(kind="causal-lm"))
