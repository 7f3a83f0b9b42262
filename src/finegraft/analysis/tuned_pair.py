"""A base and what it was tuned to, side by side, with the rows of the task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from finegraft.data.base import find_base, load_base
from finegraft.data.batches import LengthBucketedSampler
from finegraft.data.labels import label_names
from finegraft.data.prepare import Prepared, prepare
from finegraft.data.read import Tables, at_most, read_data
from finegraft.errors import BaseMismatch, RecipeError
from finegraft.grafting import merge
from finegraft.locate import sites
from finegraft.locate.collection import Sites
from finegraft.locate.site import Site
from finegraft.run.config import TuneConfig
from finegraft.run.trained import graft_folder, load_trained
from finegraft.train.evaluation import evaluate_rows, to_device
from finegraft.train.processes import processes

_OUTSIDE = ("embed", "head", "lm_head")


@dataclass
class TunedPair:
    """A base and what it was tuned to, with the rows to judge them by.

    Attributes:
        model: the base with the task's head; nothing in it takes gradients.
        tuned: the tuned model; the same modules.
        prepared: the rows.
        config: where they came from, and in which batches they go.
        device: where both models are.
    """

    model: nn.Module
    tuned: nn.Module
    prepared: Prepared
    config: TuneConfig
    device: torch.device

    @classmethod
    def load(cls, tuned: str, base: str, config: TuneConfig) -> TunedPair:
        """Loads both; see :func:`finegraft.analysis.skill.localize` for the arguments and errors."""
        if config.data.train is None:
            raise RecipeError("data.train is missing: there is nothing to find the entries with")
        tables = read_data(config.task, config.data)
        tuned_model, labels = _tuned_model(tuned, base, config, tables)
        found = load_base(base, config.task, labels=labels, seed=config.seed)
        device = processes().device
        prepared = prepare(config.task, found.processor, tables, labels=labels)
        search = cls(found.model.to(device).eval(), tuned_model.to(device).eval(), prepared, config, device)
        for parameter in (*search.model.parameters(), *search.tuned.parameters()):
            parameter.requires_grad_(False)
        return search

    def places(self) -> list[Site]:
        """Where entries may be grafted."""
        found = [s for s in sites(self.model) if s.parameter is not None and s.role not in _OUTSIDE]
        return [site for site in found if site.parameter is not None and site.parameter.is_floating_point()]

    @torch.no_grad()
    def take_heads(self) -> None:
        """Gives the base the tuned heads, which belong to the task and not to the skill's place."""
        theirs = sites(self.tuned)
        for site in sites(self.model):
            if site.role == "head" and site.parameter is not None:
                site.parameter.copy_(tensor_like(theirs, site))
                their_bias = theirs[site.name].bias
                if site.bias is not None and their_bias is not None:
                    site.bias.copy_(their_bias)

    def scores(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """All metrics on the evaluation rows, and on the test rows if there are any."""
        rows = {"eval": self.prepared.eval, "test": self.prepared.test}
        return {name: self._metrics(model, table) for name, table in rows.items() if table is not None}

    def criterion(self) -> float:
        """Train plus dev score, the higher the better; at most as many rows of train as of dev are used."""
        assert self.prepared.train is not None
        train = at_most(self.prepared.train, len(self.prepared.eval))
        found = [self._metrics(self.model, rows)[self.prepared.headline] for rows in (train, self.prepared.eval)]
        return sum(found) if self.prepared.higher_is_better else -sum(found)

    def _metrics(self, model: nn.Module, rows: Any) -> dict[str, float]:
        size = self.config.train.eval_batch_size
        return evaluate_rows(model, rows, self.prepared, batch_size=size, device=self.device).metrics

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Training batches without end, in another order in each epoch."""
        rows = self.prepared.train
        assert rows is not None
        sampler = LengthBucketedSampler(
            self.prepared.lengths(rows), self.config.train.batch_size, seed=self.config.seed
        )
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            order, epoch = list(sampler), epoch + 1
            for start in range(0, len(order), self.config.train.batch_size):
                chosen = [rows[index] for index in order[start : start + self.config.train.batch_size]]
                yield to_device(self.prepared.collate(chosen), self.device)


def _tuned_model(tuned: str, base: str, config: TuneConfig, tables: Tables) -> tuple[nn.Module, list[str] | None]:
    """The tuned model and the class names in the order of its logits."""
    if (graft_folder(tuned) / "graft.json").is_file():
        trained = load_trained(tuned, base=base)
        return merge(trained.model), trained.labels
    labels = label_names(config.task, tables)
    try:
        described = transformers.AutoConfig.from_pretrained(find_base(tuned))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{tuned} is neither a tuned model nor a graft: {error}") from error
    known = getattr(described, "id2label", None) or {}
    if labels is not None and set(known.values()) == set(labels):
        labels = [known[place] for place in sorted(known)]
    found = load_base(tuned, config.task, labels=labels, seed=config.seed)
    heads = {site.name for site in sites(found.model) if site.role == "head"}
    if missing := [name for name in found.new if name.rpartition(".")[0] in heads]:
        raise RecipeError(f"{tuned} was not tuned for {config.task.kind}: it brings no {missing[0]}")
    return found.model, labels


def tensor_like(theirs: Sites, site: Site) -> Tensor:
    """The main tensor of the same site among other ones, detached.

    Raises:
        BaseMismatch: they have no such site, or one of another shape.
    """
    if site.name not in theirs or theirs[site.name].shape != site.shape:
        found = f"is {theirs[site.name].shape} there" if site.name in theirs else "is absent there"
        raise BaseMismatch(f"the tuned model is no state of the base: {site.name!r}, {site.shape} in the base, {found}")
    tensor = theirs[site.name].parameter
    assert tensor is not None
    return tensor.detach()
