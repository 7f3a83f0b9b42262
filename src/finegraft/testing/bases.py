"""Base models that the laws are held against, one per type of site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from finegraft.locate.find import sites
from finegraft.locate.site import Site
from finegraft.testing import base_models as models

SAMPLES, TOKENS = 3, 5

Built = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Base:
    """A model to be built afresh, always the same, with a batch of it.

    Attributes:
        name: for people.
        make: builds the model and a batch such that ``model(**batch)`` works; the first axis of every tensor in the
            batch counts its samples, at least two of them.
        where: a query that finds the one site under test; not needed for recipes of their own.
        noise: deviation of what stands in for training, well above rounding, and no more than the network can bear.
    """

    name: str
    make: Callable[[], Built]
    where: Mapping[str, Any] | None = None
    noise: float = 0.3

    def build(self, dtype: torch.dtype = torch.float32) -> Built:
        """The model in evaluation mode and the batch, in a floating-point precision.

        Biases, gains and running statistics are random, so that no law holds because a factor happened to be one; one
        number of each tensor is a negative zero.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # spares asking after devices, which takes longer than a tiny model
            model, batch = self.make()
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    if tensor.is_floating_point():
                        tensor.add_(0.1 * torch.randn_like(tensor).abs())
                        tensor.view(-1)[0] = -0.0 if tensor.requires_grad else tensor.view(-1)[0]
        cast = {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in batch.items()}
        return model.eval().to(dtype), cast

    @cached_property
    def site(self) -> Site:
        """The site under test, on a model of its own."""
        (site,) = sites(self.build()[0]).where(**(self.where or {}))
        return site

    def __repr__(self) -> str:
        return self.name


def leading(result: Any) -> Tensor:
    """The first floating-point tensor with a sample axis in what a model returned: logits, or a hidden state.

    Raises:
        TypeError: there is none.
    """
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1:
            return leaf
    raise TypeError(f"no floating-point tensor with a sample axis in {type(result).__name__}")


def _tokens(width: int) -> dict[str, Tensor]:
    return {"x": torch.randn(SAMPLES, TOKENS, width)}


def _ids() -> Tensor:
    ids = torch.randint(0, models.VOCABULARY, (SAMPLES, TOKENS))
    ids[0, :2] = torch.tensor([0, 1])
    return ids


def _inside(site: nn.Module, width: int, out: int) -> Built:
    return models.Sandwich(nn.Linear(10, width), site, nn.Linear(out, 9)), _tokens(10)


def _conv(site: Any, *size: int) -> Built:
    conv = nn.Conv1d if len(size) == 1 else nn.Conv2d
    model = models.Sandwich(conv(5, site.in_channels, 1), site, conv(site.out_channels, 8, 1))
    return model, {"x": torch.randn(SAMPLES, 5, *size)}


def _batch_norm() -> Built:
    model = models.Sandwich(nn.Conv2d(5, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    return model, {"x": torch.randn(SAMPLES, 5, 4, 4)}


def _embedding() -> Built:
    return models.Sandwich(nn.Identity(), nn.Embedding(models.VOCABULARY, 12), nn.Linear(12, 9)), {"x": _ids()}


def _labels() -> dict[str, Tensor]:
    return {"labels": torch.arange(SAMPLES) % 3}


def _site(**query: Any) -> dict[str, Any]:
    return query or {"name": "site"}


BASES: tuple[Base, ...] = (
    Base("linear", lambda: _inside(nn.Linear(12, 16), 12, 16), _site()),
    Base("linear-without-bias", lambda: _inside(nn.Linear(12, 8, bias=False), 12, 8), _site()),
    Base("transposed-linear", lambda: _inside(Conv1D(16, 12), 12, 16), _site()),
    Base("called-twice", lambda: (models.CalledTwice(10), _tokens(10)), _site()),
    Base("conv1d", lambda: _conv(nn.Conv1d(8, 12, 3, stride=2, padding=1), 9), _site()),
    Base("conv2d", lambda: _conv(nn.Conv2d(8, 10, (3, 2), dilation=(1, 2), padding=1, bias=False), 5, 6), _site()),
    Base("grouped-conv2d", lambda: _conv(nn.Conv2d(8, 12, 3, padding=1, groups=2), 4, 4), _site()),
    Base("embedding", _embedding, _site()),
    Base("layer-norm", lambda: _inside(nn.LayerNorm(12), 12, 12), _site()),
    Base("rms-norm", lambda: _inside(models.RootMeanSquareRMSNorm(12), 12, 12), _site()),
    Base("batch-norm", _batch_norm, _site()),
    Base("bare-matrix", lambda: _inside(models.BareMatrix(12, 16), 12, 16), _site(name="site.projection")),
    Base("bare-vector", lambda: _inside(models.BareVector(12), 12, 12), _site(name="site.gamma")),
    Base("expert-stack", lambda: _inside(models.ExpertStack(3, 12, 10), 12, 10), _site(name="site.stack")),
    Base("tied-table", lambda: (models.TiedTable(12), {"ids": _ids()}), _site(name="embed")),
    Base("tied-pair", lambda: (models.TiedPair(10), _tokens(10)), _site(name="first")),
    Base("sublayer", lambda: (models.Transformer(8, 16, 4), _tokens(8)), _site(role="ffn")),
    Base("block", lambda: (models.Transformer(8, 16, 4), _tokens(8)), _site(role="block")),
    Base("network", lambda: (models.Transformer(8, 16, 4, depth=2), _tokens(8)), _site(role="network")),
    Base("attention", lambda: (models.Transformer(8, 16, 4), _tokens(8)), _site(role="attention")),
    Base("input", lambda: (models.Transformer(8, 16, 4), _tokens(8)), _site(role="input")),
)

COUPLED: tuple[Base, ...] = (
    Base("query-heads", lambda: (models.Transformer(8, 16, 4), _tokens(8)), _site(role="q")),
    Base("output-heads", lambda: (models.Transformer(8, 16, 4), _tokens(8)), _site(role="o")),
    Base("ffn-channels", lambda: (models.Transformer(8, 16, 4), _tokens(8)), _site(role="down")),
)
"""Layers whose heads or channels can be chosen, for kinds that train a selection."""

TASKS: tuple[Base, ...] = (
    Base("text-classifier", lambda: (models.Classifier(16, 24, 4, depth=2, classes=3), {"ids": _ids(), **_labels()})),
    Base("image-classifier", lambda: (models.ConvNet(8, 3), {"pixels": torch.randn(SAMPLES, 3, 6, 6), **_labels()})),
)
"""Whole models with a head and a loss, for methods."""
