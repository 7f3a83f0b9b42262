"""The four tasks of the comparison of module methods: sentences, questions, spoken digits and garments.

MiniLM is a pretrained base. For sound and images no pretrained transformer travels with the repository, so a small one
is first trained on speakers, or on garments, that the task does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from finegraft.data.base import load_base
from finegraft.data.images import as_image
from finegraft.data.labels import label_names
from finegraft.data.prepare import prepare
from finegraft.data.read import read_data
from finegraft.data.task import Data, Task

DATA = Path(__file__).parents[1] / "data"
FILES = {"sst2": ("sst2/train.csv", "sst2/dev.csv"), "trec": ("trec/train.csv", "trec/test.csv")}
NAMES = {"sst2": "SST-2", "trec": "TREC", "digits": "spoken digits", "garments": "garments"}
TASKS = tuple(NAMES)
NEW_SPEAKERS = (4, 5)
NEW_GARMENTS = (2, 4, 6, 8)  # pullover, coat, shirt, bag
CLASSES = {"digits": 10, "garments": len(NEW_GARMENTS)}
FRAMES, BANDS, WINDOW, HOP, RATE = 40, 32, 256, 128, 8000

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Given:
    """A base with its head, and the rows of a task.

    Attributes:
        model: the base, its head drawn afresh.
        train: rows to train on.
        test: rows to score.
        collate: makes a batch of rows.
        lengths: how long each row is.
    """

    model: nn.Module
    train: Any
    test: Any
    collate: Callable[[Any], dict[str, Tensor]]
    lengths: Callable[[Any], Sequence[int]]


def given(task: str, seed: int, *, rows: int, max_length: int) -> Given:
    """A task with at most ``rows`` training examples; the seed draws the new head."""
    if task in FILES:
        return _text(task, seed, rows, max_length)
    _, (train, test) = _digits() if task == "digits" else _garments()
    return Given(_with_new_head(task, seed), train[:rows], test, _stacked, lambda some: [1] * len(some))


def _text(task: str, seed: int, rows: int, max_length: int) -> Given:
    settings = Task(kind="classification", max_length=max_length)
    train, test = (DATA / name for name in FILES[task])
    tables = read_data(settings, Data(train=train, eval=test, limit=rows))
    labels = label_names(settings, tables)
    base = load_base("minilm", settings, labels=labels, seed=seed)
    prepared = prepare(settings, base.processor, tables, labels=labels)
    return Given(base.model, prepared.train, prepared.eval, prepared.collate, prepared.lengths)


def _stacked(rows: Rows) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _split(rows: Rows, new: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    known = [row for row, is_new in zip(rows, new, strict=True) if not is_new]
    return known, [row for row, is_new in zip(rows, new, strict=True) if is_new]


@cache
def _digits() -> tuple[Rows, tuple[Rows, Rows]]:
    """Recordings of the known speakers; those of the new ones to train on, and to score."""
    splits = []
    for name in ("train", "test"):
        table = pq.read_table(DATA / f"fsdd/{name}.parquet").to_pydict()
        rows = [
            {"input_values": _log_mel(wave), "labels": torch.tensor(digit)}
            for wave, digit in zip(table["waveform"], table["label"], strict=True)
        ]
        splits.append(_split(rows, [speaker in NEW_SPEAKERS for speaker in table["speaker"]]))
    (known, train), (_, test) = splits
    return known, (train, test)


def _log_mel(waveform: Sequence[int]) -> Tensor:
    """A recording of int16 samples as (frames, bands), mean 0 and deviation 1, cut or padded to 0.66 s."""
    samples = torch.tensor(waveform, dtype=torch.float32) / 32768
    length = WINDOW + HOP * (FRAMES - 1)
    samples = torch.nn.functional.pad(samples[:length], (0, max(0, length - len(samples))))
    power = torch.stft(samples, WINDOW, HOP, window=torch.hann_window(WINDOW), center=False, return_complex=True)
    bands = torch.log(_bank().T @ power.abs().square() + 1e-4).T
    return (bands - bands.mean()) / bands.std()


@cache
def _bank() -> Tensor:
    bank = mel_filter_bank(WINDOW // 2 + 1, BANDS, 50.0, RATE / 2, RATE, mel_scale="htk")
    return torch.from_numpy(bank.astype(np.float32))


@cache
def _garments() -> tuple[Rows, tuple[Rows, Rows]]:
    """Images of the known garments; those of the new ones to train on, and to score. Classes are numbered afresh."""
    splits = []
    for name in ("train", "test"):
        table = pq.read_table(DATA / f"fashion_mnist/{name}.parquet").to_pydict()
        rows = [
            {"pixel_values": _pixels(image), "labels": torch.tensor(label)}
            for image, label in zip(table["image"], table["label"], strict=True)
        ]
        splits.append(_split(rows, [label in NEW_GARMENTS for label in table["label"]]))
    (known, train), (_, test) = splits
    old = [label for label in range(10) if label not in NEW_GARMENTS]
    return _renumbered(known, old), (_renumbered(train, NEW_GARMENTS), _renumbered(test, NEW_GARMENTS))


def _pixels(image: Any) -> Tensor:
    grey = np.asarray(as_image(image["bytes"] if isinstance(image, dict) else image).convert("L"), dtype=np.float32)
    return torch.from_numpy(grey / 127.5 - 1).unsqueeze(0)


def _renumbered(rows: Rows, labels: Sequence[int]) -> list[dict[str, Any]]:
    return [{**row, "labels": torch.tensor(labels.index(int(row["labels"])))} for row in rows]


_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.05,
}


def _model(task: str, classes: int) -> Any:
    """A small transformer as it is drawn."""
    if task == "digits":
        sizes = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": FRAMES, "num_mel_bins": BANDS}
        return transformers.ASTForAudioClassification(transformers.ASTConfig(**_SMALL, **sizes, num_labels=classes))
    config = transformers.ViTConfig(**_SMALL, image_size=28, patch_size=4, num_channels=1, num_labels=classes)
    return transformers.ViTForImageClassification(config)


def _with_new_head(task: str, seed: int) -> nn.Module:
    """The body trained on what is known, under a head drawn from the seed."""
    body = {name: tensor for name, tensor in _pretrained(task).items() if not _in_head(name)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(task, CLASSES[task])
    model.load_state_dict(body, strict=False)
    return model.eval()


def _in_head(name: str) -> bool:
    return name.startswith("classifier.") and "layernorm" not in name


@cache
def _pretrained(task: str) -> dict[str, Tensor]:
    """Weights of a model trained on the speakers or garments that are known."""
    rows, epochs = (_digits()[0], 30) if task == "digits" else (_garments()[0], 12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(task, 10 if task == "digits" else 10 - CLASSES[task])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        order = [part for _ in range(epochs) for part in torch.randperm(len(rows)).split(16)]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(order), pct_start=0.1)
        for part in order:
            optimizer.zero_grad()
            batch = _stacked([rows[int(i)] for i in part])
            model.train()(**batch).loss.backward()
            optimizer.step()
            schedule.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}
