"""The tensors of one change at one site: the ``p`` that a kind's functions read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.deltas.delta import Delta
from finegraft.errors import StoreError
from finegraft.locate.site import Site
from finegraft.select.units import Units

_TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def checked_slot(delta: Delta, site: Site, place: tuple[int, int], found: dict[str, Tensor]) -> tuple[Site, Slot]:
    """A slot with tensors read from a file, and its site with the chosen units, after all was held against the site.

    Raises:
        StoreError: a tensor is missing, unknown, of another shape or type, or not finite; or indices that do not fit.
    """
    if delta.needs_selection:
        site = _with_units(delta, site, found)
    _check_tensors(delta, site, found)
    slot = Slot(delta, site, place, found)
    for name, tensor in slot.tensors():
        if not bool(tensor.isfinite().all()):
            raise StoreError(
                f"{site.name!r}: tensor {name!r} holds NaN or infinity: the training that made this graft diverged"
            )
    return site, slot


def _with_units(delta: Any, site: Site, found: dict[str, Tensor]) -> Site:
    if "index" not in found:
        raise StoreError(f"{site.name!r}: kind {delta.kind!r} needs the tensor 'index'; the file holds {sorted(found)}")
    units = Units(delta.unit, found["index"])
    if flaw := units.flaw((*site.batch, site.fan_out, site.fan_in)):
        raise StoreError(f"{site.name!r}: the indices in tensor 'index' do not fit: {flaw}")
    return replace(site, chosen=units.index)


def _check_tensors(delta: Delta, site: Site, found: dict[str, Tensor]) -> None:
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
        chosen = delta.needs_selection and name == "index"
        if not chosen and found[name].dtype not in _TRAINABLE:
            raise StoreError(
                f"{site.name!r}: tensor {name!r} is {found[name].dtype} in the file; "
                "it must be float16, bfloat16, float32 or float64"
            )


@torch.no_grad()
def changes_nothing(slots: Iterable[tuple[Site, Slot]]) -> bool:
    """Whether not one of the changes has an effect; a new head has one if it differs from the model's own."""
    return not any(slot.delta.has_effect(slot, site) for site, slot in slots)
