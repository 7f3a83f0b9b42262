"""One run of a comparison of methods: train MiniLM on one task, score it, and see what it forgot."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import finegraft as fg
from finegraft.data.base import load_base
from finegraft.data.batches import LengthBucketedSampler
from finegraft.data.labels import label_names
from finegraft.data.prepare import Prepared, prepare
from finegraft.data.read import read_data
from finegraft.data.task import Data, Task
from finegraft.train.cadence import Cadence
from finegraft.train.evaluation import batches_of, evaluate_rows, inferring
from finegraft.train.optimizers import training_arguments
from finegraft.train.progress import ProgressReport
from finegraft.train.trainer import GraftTrainer
from lines import digest
from quality_contenders import SHARE, Entrant, at_share, trained_in

DATA = Path(__file__).parents[1] / "data"
FILES = {"sst2": ("sst2/train.csv", "sst2/dev.csv"), "trec": ("trec/train.csv", "trec/test.csv")}
OTHER = {"sst2": "trec", "trec": "sst2"}
CALIBRATION_BATCHES = 16
PROBE_ROWS = 500  # to train on, and to score
PROBE_RIDGE = 0.1  # beside about 500 features of length 1
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Attributes:
        rows: training examples of each task.
        epochs: passes over them.
        batch_size: examples in a step.
        max_length: tokens of an example.
        precision: of training, as ``train.precision`` says it; scores are taken in fp32.
        share: of the base's numbers that train where a method has a budget.
        version: of this file; another one makes all runs anew.
    """

    rows: int = 1000
    epochs: int = 2
    batch_size: int = 16
    max_length: int = 64
    precision: str = "bf16"
    share: float = SHARE
    version: int = 1


@dataclass(frozen=True)
class Job:
    """A run to be done."""

    entrant: Entrant
    task: str
    seed: int
    settings: Settings

    @property
    def key(self) -> str:
        """What the run is known by: it changes with anything that decides its result."""
        return digest([self.entrant.data(), self.task, self.seed, asdict(self.settings)])


def run(job: Job) -> dict[str, Any]:
    """Train and score; returns one line of the results."""
    began = time.monotonic()
    settings = job.settings
    base, prepared = _loaded(job.task, job.seed, settings)
    calibration = list(_calibration(prepared, job))
    model: nn.Module = base.model
    changes: dict[str, Any] = {}
    change: Any = job.entrant.wrapped(model)
    if change is not None:
        model, trained = change.model, change.trained
    else:
        recipe, changes = at_share(job.entrant.recipe, model, calibration, seed=job.seed)
        change = fg.graft(model, recipe, calibration=calibration, seed=job.seed)
        trained = trained_in(change)
    training = time.process_time()
    losses = _train(model, change, prepared, job)
    training = time.process_time() - training
    scores = evaluate_rows(model, prepared.eval, prepared).metrics
    return {
        "key": job.key,
        "entrant": job.entrant.name,
        "task": job.task,
        "seed": job.seed,
        "accuracy": scores["accuracy"],
        "probe": probe(model, OTHER[job.task], settings),
        "trained": trained,
        "budget": changes,
        "lr": change.recipe.train.lr,
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
        "training_seconds": round(training, 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def untouched_probe(task: str, settings: Settings) -> float:
    """The probe's accuracy on a task with the features of the untouched base."""
    return probe(_loaded(task, 0, settings)[0].model, task, settings)


def _train(model: nn.Module, change: Any, prepared: Prepared, job: Job) -> list[float]:
    assert prepared.train is not None
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            change.recipe.train,
            out=Path(folder),
            epochs=job.settings.epochs,
            batch_size=job.settings.batch_size,
            seed=job.seed,
        )
        trainer = GraftTrainer(
            model,
            change,
            arguments,
            train_dataset=prepared.train,
            collate=prepared.collate,
            lengths=prepared.lengths(prepared.train),
            cadence=_NoCheckpoints(),
            precision=job.settings.precision,
        )
        trainer.remove_callback(ProgressReport)
        trainer.train()
    return trainer.losses


class _NoCheckpoints(Cadence):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
        """Nothing is saved: a run that is broken off starts again."""


def probe(model: nn.Module, task: str, settings: Settings) -> float:
    """Accuracy on a task of a ridge classifier over the model's frozen features: the mean of the last hidden states."""
    prepared = _other(task, settings)
    assert prepared.train is not None
    train, test = (rows.select(range(min(PROBE_ROWS, len(rows)))) for rows in (prepared.train, prepared.eval))
    (x, y), (test_x, test_y) = _features(model, train, prepared), _features(model, test, prepared)
    targets = torch.nn.functional.one_hot(y).double()
    gram = x.T @ x + PROBE_RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ (targets - targets.mean(0)))
    return float(((test_x @ weights + targets.mean(0)).argmax(1) == test_y).double().mean())


def _features(model: Any, rows: Any, prepared: Prepared) -> tuple[Tensor, Tensor]:
    encoder = getattr(model, "get_base_model", lambda: model)().base_model
    features, labels = [], []
    with inferring(model, "fp32", CPU):
        for batch in batches_of(rows, prepared.collate, prepared.lengths(rows), batch_size=64, device=CPU):
            labels.append(batch.pop("labels"))
            hidden = encoder(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            features.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).double())
    return torch.cat(features), torch.cat(labels)


def _calibration(prepared: Prepared, job: Job) -> Iterator[dict[str, Tensor]]:
    rows, size = prepared.train, job.settings.batch_size
    assert rows is not None
    order = list(LengthBucketedSampler(prepared.lengths(rows), size, seed=job.seed))
    for start in range(0, min(len(order), size * CALIBRATION_BATCHES), size):
        yield prepared.collate([rows[index] for index in order[start : start + size]])


def _task(settings: Settings) -> Task:
    return Task(kind="classification", max_length=settings.max_length)


@cache
def _tables(task: str, settings: Settings) -> Any:
    train, test = (DATA / name for name in FILES[task])
    return read_data(_task(settings), Data(train=train, eval=test, limit=settings.rows))


def _loaded(task: str, seed: int, settings: Settings) -> tuple[Any, Prepared]:
    tables = _tables(task, settings)
    labels = label_names(_task(settings), tables)
    base = load_base("minilm", _task(settings), labels=labels, seed=seed)
    return base, prepare(_task(settings), base.processor, tables, labels=labels)


@cache
def _other(task: str, settings: Settings) -> Prepared:
    return _loaded(task, 0, settings)[1]
