"""The tensors of one change at one site: the ``p`` that a kind's functions read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.deltas.delta import Delta
from finegraft.errors import StoreError
from finegraft.locate.site import Site


class Slot(nn.Module):
    """Trained tensors as parameters, kept ones as buffers, each under its own name.

    Attributes:
        delta: the kind with its settings.
        op: how the site computes.
        site: the site's name.
        place: ``(part, position)`` in the recipe.
    """

    def __init__(self, delta: Delta, site: Site, place: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.delta: Any = delta  # typed loosely, since kinds that train in place have more functions than others
        self.op, self.site, self.place = site.op, site.name, place
        trained = delta.shapes(site)
        reference = next(site.module.parameters(recurse=True))
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensor = tensor.to(reference.device, trained_dtype(reference.dtype))
            if name in trained:
                self.register_parameter(name, nn.Parameter(tensor.to(reference.device)))
            else:
                self.register_buffer(name, tensor.to(reference.device))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, trained or kept."""
        yield from self.named_parameters(recurse=False)
        yield from self.named_buffers(recurse=False)

    @property
    def key(self) -> str:
        """Prefix of this slot's tensors in files and checkpoints."""
        return f"{self.site}/{self.place[0]}.{self.place[1]}"


def trained_dtype(base: torch.dtype) -> torch.dtype:
    """Trained numbers are float32 on half-precision bases, else of the base's precision."""
    return base if base in (torch.float32, torch.float64) else torch.float32


def fresh_tensors(delta: Delta, site: Site, place: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """The tensors of a change at its start, drawn from the seed, the site's name and the place in the recipe."""
    digest = hashlib.sha256(f"{seed}/{site.name}/{place}".encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    with torch.no_grad():
        given = delta.initial(site, rng)
    shapes = {**delta.shapes(site), **delta.constants(site)}
    return {name: given[name].detach() if name in given else torch.zeros(shape) for name, shape in shapes.items()}


def checked_tensors(delta: Delta, site: Site, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors read from a file, after every name and shape has been held against the site.

    Raises:
        StoreError: a tensor is missing, unknown or of another shape.
    """
    expected = {**delta.shapes(site), **delta.constants(site)}
    if set(found) != set(expected):
        raise StoreError(
            f"{site.name!r}: kind {delta.kind!r} has tensors {sorted(expected)}, the file holds {sorted(found)}"
        )
    for name, shape in expected.items():
        if tuple(found[name].shape) != tuple(shape):
            raise StoreError(
                f"{site.name!r}: tensor {name!r} is {tuple(found[name].shape)} in the file; it must be {shape}"
            )
    return found
