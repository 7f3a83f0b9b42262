"""The tensors of one change at one site: the ``p`` that a kind's functions read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.deltas.delta import Delta
from finegraft.errors import SiteError, StoreError
from finegraft.grafting.leading_ranks import Leading, at_rank
from finegraft.grafting.working import Working
from finegraft.locate.site import Site

SELECTION = ("index", "settled_index", "settled_values")
"""What a change of chosen units holds beside its ``values``: which they are, and what settled ones were left at."""

_TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Slot(nn.Module):
    """Trained tensors as parameters, kept ones as buffers, each under its own name.

    Attributes:
        delta: the kind with its settings.
        op: how the site computes.
        site: the site's name.
        place: ``(part, position)`` in the recipe.
        moved: whether other units train than those chosen when the graft was made.
        seed: a number of its own that follows from the graft's seed; for kinds whose random numbers are not stored.
        borrowed: names of its tensors that another slot of the part holds, counts and saves.
        sharing: names of its tensors in common with other slots of the part, with labels that say with which.
        sample_weights: what each sample of the batch is weighed with; see :func:`finegraft.grafting.weighing.weigh`.
        task: numbers of the task it acts for, or a tuple of such for each sample; None is the first task.
        state: what a kind remembers of the last pass, without gradient, for penalties and retrieval.
        leading: in training only so many of its ranks act; None for all.
        last_only: whether of these only the last one gets a gradient.
    """

    values: Any  # those of kinds that train chosen units
    index: Any
    settled_index: Any
    settled_values: Any

    def __init__(
        self,
        delta: Delta,
        site: Site,
        place: tuple[int, int],
        tensors: dict[str, Tensor],
        working: Working | None = None,
    ) -> None:
        super().__init__()
        self.delta: Any = delta  # typed loosely, since kinds that train in place have more functions than others
        self.op, self.site, self.place, self.moved = site.op, site.name, place, False
        self.seed, self.borrowed, self.sharing = 0, frozenset[str](), delta.sharing(site)
        self.task: tuple[Any, ...] | None = None
        self.state: Tensor | None = None
        self.sample_weights: Tensor | None = None
        self._working = None if delta.working_key(site) is None else working
        self.leading: int | None = None
        self.last_only = False
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        if self._working is not None:
            for name, tensor in before.items():
                after: Any = self._buffers[name]
                self._buffers[name] = self._working.moved(tensor, after)
        return self

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold other units and their values; the parameter stays the same object, without a gradient."""
        for name in ("values", *SELECTION):
            self._refill(name, tensors[name])
        self.moved = True

    def resize(self, delta: Delta, tensors: Mapping[str, Tensor]) -> None:
        """Become a change of another rank; parameters stay the same objects, without gradients."""
        self.delta = delta
        for name, tensor in tensors.items():
            self._refill(name, tensor)

    def _refill(self, name: str, tensor: Tensor) -> None:
        held: Any = getattr(self, name)
        if not isinstance(held, nn.Parameter):
            setattr(self, name, tensor.to(held.device, held.dtype))
            return
        taken = tensor.to(held.device, held.dtype, copy=True)
        held.grad = None
        # Autograd's accumulator knows the shape, and a graph that is still held keeps it; another type lets go of it.
        held.data = taken.new_empty(0, dtype=torch.float16)
        held.data = taken

    def acting(self) -> tuple[Any, Any]:
        """The change that acts in forward now, and its tensors: of leading ranks, where that is asked for."""
        if self.leading is None or not self.training:
            return self.delta, self
        view = Leading(self, self.delta.rank_axes, self.leading, last_only=self.last_only)
        return at_rank(self.delta, self.leading), view

    @property
    def key(self) -> str:
        """Prefix of this slot's tensors in files and checkpoints."""
        return f"{self.site}/{self.place[0]}.{self.place[1]}"


def own_seed(seed: int, site: str, place: tuple[int, int]) -> int:
    """A number of 56 bits for one change at one site."""
    digest = hashlib.sha256(f"{seed}/{site}/{place}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def unite(slots: Iterable[Slot]) -> None:
    """Let changes of one place in the recipe have their shared tensors in common: those of the first of them."""
    first: dict[tuple[tuple[int, int], str, str], Slot] = {}
    for slot in slots:
        lenders = {name: first.setdefault((slot.place, name, label), slot) for name, label in slot.sharing.items()}
        slot.borrowed = frozenset(name for name, lender in lenders.items() if lender is not slot)
        for name in slot.borrowed:
            lender = lenders[name]
            if (own := getattr(slot, name)).shape != (lent := getattr(lender, name)).shape:
                raise SiteError(
                    f"{name!r} is shared by all sites of a part: it is {tuple(lent.shape)} at {lender.site!r}, and "
                    f"would be {tuple(own.shape)} at {slot.site!r}. Give each width a part of its own"
                )
            setattr(slot, name, lent)


def trained_dtype(base: torch.dtype) -> torch.dtype:
    """Trained numbers are float32 on half-precision bases, else of the base's precision."""
    return base if base in (torch.float32, torch.float64) else torch.float32


def fresh_slot(delta: Delta, site: Site, place: tuple[int, int], seed: int, working: Working) -> Slot:
    """A change at its start, drawn from the seed, the site's name and the place in the recipe."""
    return Slot(delta, site, place, _fresh_tensors(delta, site, place, seed) | _frozen(delta, site, working), working)


def _frozen(delta: Delta, site: Site, working: Working) -> dict[str, Tensor]:
    reference = next(site.module.parameters(recurse=True))
    return working.of(delta, site, reference.device, trained_dtype(reference.dtype))


def _fresh_tensors(delta: Delta, site: Site, place: tuple[int, int], seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(own_seed(seed, site.name, place))
    with torch.no_grad():
        given = delta.initial(site, rng)
    shapes = {**delta.shapes(site), **delta.constants(site)}
    return {name: given[name].detach() if name in given else torch.zeros(shape) for name, shape in shapes.items()}


def stored_tensors(slot: Slot, site: Site) -> dict[str, Tensor]:
    """The tensors of a change as a file has them: settled units among those that train, no borrowed ones."""
    saved = slot.delta.saved(slot, site).items()
    return {name: tensor.detach() for name, tensor in saved if name not in slot.borrowed}


def check_selection(slot: Slot, site: Site, tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`StoreError` where units and values of a checkpoint do not fit a site, or each other."""
    for index, values in (("index", "values"), ("settled_index", "settled_values")):
        units = slot.delta.units(tensors[index])
        flaw = units.flaw(site.matrix_shape) if len(tensors[index]) or index == "index" else None
        if flaw is None and tuple(tensors[values].shape) != tuple(units.shape(site.matrix_shape)):
            flaw = f"there are {len(tensors[index])} of them, and {values!r} is {tuple(tensors[values].shape)}"
        if flaw:
            raise StoreError(f"{slot.site!r}: the indices in {index!r} of the state do not fit: {flaw}")


def checked_slot(
    delta: Delta, site: Site, place: tuple[int, int], found: dict[str, Tensor], working: Working
) -> tuple[Site, Slot]:
    """A slot with tensors read from a file, and its site with the chosen units, after all was held against the site.

    Raises:
        StoreError: a tensor is missing, unknown, of another shape or type, or not finite; or indices that do not fit.
    """
    found = delta.loaded(found)
    if delta.needs_selection:
        site = _with_units(delta, site, found)
    _check_tensors(delta, site, found)
    slot = Slot(delta, site, place, found | _frozen(delta, site, working), working)
    for name, tensor in slot.tensors():
        if not bool(tensor.isfinite().all()):
            raise StoreError(
                f"{site.name!r}: tensor {name!r} holds NaN or infinity: the training that made this graft diverged"
            )
    return site, slot


def _with_units(delta: Any, site: Site, found: dict[str, Tensor]) -> Site:
    if "index" not in found:
        raise StoreError(f"{site.name!r}: kind {delta.kind!r} needs the tensor 'index'; the file holds {sorted(found)}")
    units = delta.units(found["index"])
    if flaw := units.flaw(site.matrix_shape):
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
