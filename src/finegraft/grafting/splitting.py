"""Running a batch in parts, each through its own grafts: for changes that no layer can tell samples apart by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from finegraft.errors import RecipeError
from finegraft.locate.roles import EXPERTS_SEGMENT
from finegraft.locate.site import Site

_PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Part:
    """Samples of a batch that go through the same grafts.

    Attributes:
        rows: their places in the batch.
        begin: puts these grafts, and no other, in force.
    """

    rows: tuple[int, ...]
    begin: Callable[[], None]


@dataclass(frozen=True)
class Split:
    """How the model's forward runs while its batch is routed in parts.

    Attributes:
        parts: the parts; every sample is in one of them. None where layers do the routing by themselves.
        samples: size of the batch.
    """

    parts: tuple[Part, ...]
    samples: int

    def run(self, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """``call(*args, **kwargs)`` part by part, the results put together in the order of the batch.

        A loss (any tensor without axes) becomes the mean over samples. What has no samples and differs from part to
        part, such as a key-value cache, becomes None.

        Raises:
            RecipeError: inputs that hold no tensor of that many samples, or cannot be split.
        """
        leaves, spec = tree_flatten((args, kwargs))
        if not any(self._counts_samples(leaf) for leaf in leaves):
            shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
            raise RecipeError(f"route was given {self.samples} samples; the batch has tensors of shapes {shapes}")
        if not self.parts:
            return call(*args, **kwargs)
        outcomes = []
        for part in self.parts:
            part.begin()
            own_args, own_kwargs = tree_unflatten([self._rows(leaf, part.rows) for leaf in leaves], spec)
            outcomes.append(tree_flatten(call(*own_args, **own_kwargs)))
        _, form = outcomes[0]
        if any(len(found) != len(outcomes[0][0]) for found, _ in outcomes):
            raise RecipeError(
                "the model's outputs for different grafts are of different structure, so they make no batch"
            )
        joined = [self._joined(found) for found in zip(*(found for found, _ in outcomes), strict=True)]
        return tree_unflatten(joined, form)

    def _counts_samples(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == self.samples

    def _rows(self, leaf: Any, rows: tuple[int, ...]) -> Any:
        if self._counts_samples(leaf):
            return leaf.index_select(0, torch.tensor(rows, device=leaf.device))
        if isinstance(leaf, (Tensor, *_PLAIN, torch.dtype, torch.device)):
            return leaf
        raise RecipeError(
            f"a routed graft here needs the batch split, but an input is a {type(leaf).__name__}, which cannot be; "
            "leave it out (for generation: use_cache=False)"
        )

    def _joined(self, found: Sequence[Any]) -> Any:
        first = found[0]
        if not all(isinstance(leaf, Tensor) for leaf in found):
            return first if all(leaf is first or leaf == first for leaf in found[1:]) else None
        if all(leaf.ndim == 0 for leaf in found):
            return sum(leaf * len(part.rows) for leaf, part in zip(found, self.parts, strict=True)) / self.samples
        repeats = {len(leaf) / len(part.rows) for leaf, part in zip(found, self.parts, strict=True)}
        repeat = repeats.pop()
        if not repeats and repeat.is_integer() and len({leaf.shape[1:] for leaf in found}) == 1:
            return self._in_order(found, int(repeat))
        if all(torch.equal(leaf, first) for leaf in found[1:]):
            return first
        raise RecipeError(
            f"outputs of shapes {[tuple(leaf.shape) for leaf in found]} for different grafts make no batch"
        )

    def _in_order(self, found: Sequence[Tensor], repeat: int) -> Tensor:
        """Rows back in the order of the batch; a sample may have several, as where samples and tokens are one axis."""
        order = torch.tensor([row for part in self.parts for row in part.rows], device=found[0].device)
        places = (order.unsqueeze(-1) * repeat + torch.arange(repeat, device=order.device)).flatten()
        return torch.cat(list(found)).index_select(0, places.argsort())


def sees_samples(site: Site) -> bool:
    """Whether the first axis of what a site's layer takes counts the samples of the batch.

    Not so for a bare tensor, for an embedding inside a block (it looks up positions), for an expert (it takes the
    tokens that were sent to it), for a whole block, which may run on tokens that its changes choose, for a
    whole stack, of which every block counts, and for the input of a stack, where prompts make sequences of different
    lengths.
    """
    tensors = site.kind == "tensor" or any(attribute != "weight" for _, _, attribute in site.aliases)
    positions = site.type == "embedding" and bool(site.block)
    whole = site.type in ("block", "network", "input")
    return not (
        tensors or positions or whole or any(EXPERTS_SEGMENT.match(segment) for segment in site.name.split("."))
    )
