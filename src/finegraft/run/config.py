"""The configuration of the main job: its shape, and what it was made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from finegraft.data.task import Data, Settings, Task


class TrainSettings(Settings):
    """How long and how to train; what a method prescribes (optimizer, schedule) is in its recipe."""

    epochs: PositiveFloat = Field(default=3.0, description="passes over the training rows")
    steps: PositiveInt | None = Field(default=None, description="optimizer steps; given, epochs has no effect")
    batch_size: PositiveInt = Field(default=32, description="rows in a batch, per device")
    eval_batch_size: PositiveInt = Field(default=64, description="rows in a batch of evaluation")
    gradient_accumulation: PositiveInt = Field(default=1, description="batches per optimizer step")
    lr: PositiveFloat | None = Field(default=None, description="peak learning rate instead of the method's")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="bf16 autocast, none, or bf16 where the processor has it and it is measured to be faster",
    )
    eval_every: PositiveInt | None = Field(
        default=None, description="steps between evaluations; by default one each epoch"
    )
    checkpoint_every: PositiveInt | None = Field(
        default=None, description="steps between checkpoints; by default one each epoch"
    )
    report_to: tuple[str, ...] = Field(
        default=(), description="experiment trackers of Transformers, such as tensorboard"
    )


def _method(value: Any) -> Any:
    if isinstance(value, dict) and not isinstance(value.get("name"), str) and "parts" not in value:
        raise ValueError("give a method's name, {name: lora, rank: 16}, or a whole recipe with parts:")
    if any(not math.isfinite(number) for number in _numbers(value)):
        raise ValueError("every number has to be finite")
    return value


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


class TuneConfig(Settings):
    """Everything that a run is made of.

    Example:
        >>> TuneConfig.model_validate({
        ...     "base": "minilm", "task": {"kind": "classification"}, "method": "lora",
        ...     "data": {"train": "train.csv", "eval": "dev.csv"}, "out": "runs/one",
        ... }).train.batch_size
        32
    """

    base: str = Field(description="the pretrained model: hub id, local folder, or minilm")
    task: Task = Field(description="the kind of task and the columns it reads")
    data: Data = Field(description="where the rows come from")
    method: Annotated[str | dict[str, Any], BeforeValidator(_method)] = Field(
        description="a method's name, {name: ..., setting: value}, or a whole recipe"
    )
    train: TrainSettings = Field(default=TrainSettings(), description="how long and how to train")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of all random numbers")
    out: str = Field(description="folder for everything that comes of the run")

    def plain(self) -> dict[str, Any]:
        """Plain data that validates to an equal configuration."""
        return self.model_dump(mode="json", exclude_none=True)


_FREE_TO_CHANGE = ("out", "train.checkpoint_every", "train.report_to")


def changed_keys(before: TuneConfig, now: TuneConfig) -> list[str]:
    """Keys in which two configurations would not give the same result, such as ``train.lr``.

    ``precision: auto`` agrees with whatever was chosen. Where a run is kept, how often it saves and to whom it
    reports do not count.
    """
    old, new = _flat(before.plain()), _flat(now.plain())
    if new["train.precision"] == "auto":
        new["train.precision"] = old["train.precision"]
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [key for key in keys if key not in _FREE_TO_CHANGE]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
