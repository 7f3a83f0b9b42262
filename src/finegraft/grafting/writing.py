"""Writing changes into the base's tensors, and putting back what was there, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.errors import RecipeError
from finegraft.grafting.chain import Chain, Group, Original, Written
from finegraft.grafting.slot import trained_dtype
from finegraft.grafting.standing import Home, changed_bias, changed_weight
from finegraft.quantised.stored import dense, is_quantised
from finegraft.quantised.tensor import QuantisedTensor
from finegraft.resident.entry_writes import write_sum_
from finegraft.select.units import EVERYTHING, Units


@torch.no_grad()
def rewrite(chain: Chain, module: Any, groups: Sequence[Group]) -> None:
    """Let exactly these groups stand in the base's tensors, written in this order; the cost is what they touch.

    What a write replaces is on record before the write, so that :func:`restore` undoes one that was broken off.
    """
    restore(chain, module)
    for group in groups:
        in_place = all(slot.delta.in_place for slot in group.slots)
        chain.written = (*chain.written, Written(group, (), trains(group), _versions(group)))
        (_write_units if in_place else _write_all)(chain, module, group)
    chain.home = Home(module._parameters[chain.tensor]) if chain.written else None


def trains(group: Group) -> bool:
    """Whether gradients must reach the values of a group that stands in the base's tensors."""
    return group.in_place and not group.merged and any(p.requires_grad for s in group.slots for p in s.parameters())


@torch.no_grad()
def restore(chain: Chain, module: Any) -> None:
    """Put back the originals of everything written, last first."""
    for written in reversed(chain.written):
        for original in reversed(written.originals):
            if original.buffer is None:
                module._parameters[original.tensor] = None
            else:
                _put(chain, module, original.tensor, original.units, chain.get_buffer(original.buffer))
    forget(chain)


def forget(chain: Chain) -> None:
    """Drop the originals: what is written stays for good."""
    for written in chain.written:
        for original in written.originals:
            if original.buffer is not None:
                del chain._buffers[original.buffer]
    chain._non_persistent_buffers_set.clear()
    chain.written, chain.home = (), None


@torch.no_grad()
def refresh(chain: Chain, module: Any) -> None:
    """Bring the base's tensors up to date with values that have trained since they were written.

    Values that count no change are written again too, since ``p.data`` may change uncounted; such a write is hidden
    from autograd's own count, because it gives the same numbers unless the values did change.
    """
    first = next((i for i, w in enumerate(chain.written) if w.trains), None)
    if first is None or chain.away(module):
        return
    beneath, changing = chain.written[:first], chain.written[first:]
    moved = any(w.versions != _versions(w.group) for w in changing if w.trains)
    if all(w.group.in_place for w in changing):
        _write_again(chain, module, changing, counted=moved)
        if moved:
            chain.written = (*beneath, *(replace(w, versions=_versions(w.group)) for w in changing))
    elif moved:
        rewrite(chain, module, [w.group for w in chain.written])


def _versions(group: Group) -> tuple[int, ...]:
    return tuple(p._version for slot in group.slots for p in slot.parameters())


def _write_units(chain: Chain, module: Any, group: Group) -> None:
    for name, units, values in _changes(chain, group):
        before = units.gather(_matrix(chain, module, name))
        _record(chain, name, units, before)
        _put(chain, module, name, units, values, over=before, scale=group.scale)


def _write_again(chain: Chain, module: Any, changing: Sequence[Written], *, counted: bool) -> None:
    """Write groups that lie one upon the other anew; the originals of all but the lowest change with those beneath."""
    lowest, *above = changing
    for original in (original for written in reversed(above) for original in reversed(written.originals)):
        _put(chain, module, original.tensor, original.units, chain.get_buffer(original.buffer or ""), counted=counted)
    for written in changing:
        for original, (name, units, values) in zip(written.originals, _changes(chain, written.group), strict=True):
            before = chain.get_buffer(original.buffer or "")
            if written is not lowest:
                before.copy_(units.gather(_matrix(chain, module, name)))
            _put(chain, module, name, units, values, over=before, scale=written.scale, counted=counted)


def _changes(chain: Chain, group: Group) -> list[tuple[str, Units, Tensor]]:
    return [
        (chain.tensor if change.tensor == "weight" else change.tensor, change.units, change.values)
        for slot in group.slots
        for change in slot.delta.changes(slot)
    ]


def _write_all(chain: Chain, module: Any, group: Group) -> None:
    stored = module._parameters[chain.tensor]
    before = _matrix(chain, module, chain.tensor)
    after = changed_weight(group, before.to(trained_dtype(stored.dtype)))
    bias = module._parameters.get("bias") if chain.op.callable else None
    old_bias = None if bias is None else bias.detach().to(trained_dtype(bias.dtype))
    new_bias = changed_bias(group, old_bias, lambda: before.to(trained_dtype(stored.dtype)))
    if bias is not None and new_bias is not None:
        _record(chain, "bias", EVERYTHING, bias.detach().unsqueeze(-1).clone())
        _put(chain, module, "bias", EVERYTHING, new_bias.unsqueeze(-1))
    elif new_bias is not None:
        _record(chain, "bias", EVERYTHING, None)
        module._parameters["bias"] = nn.Parameter(new_bias.to(stored.device, stored.dtype), requires_grad=False)
    _record(chain, chain.tensor, EVERYTHING, stored.detach() if is_quantised(stored) else before.clone())
    _put(chain, module, chain.tensor, EVERYTHING, after)


def _in_format(held: Any, values: Tensor) -> Tensor:
    """A whole matrix in the format of a quantised weight; one that is quantised already comes as it is."""
    return values if is_quantised(values) else QuantisedTensor.of(values.to(held.dtype), held.quantiser)


def _record(chain: Chain, tensor: str, units: Units, before: Tensor | None) -> None:
    """Note what the newest group is about to replace; None for a bias that is about to be added."""
    *earlier, newest = chain.written
    buffer = None if before is None else f"original_{sum(len(w.originals) for w in chain.written)}"
    if buffer is not None:
        chain.register_buffer(buffer, before, persistent=False)
    newest = replace(newest, originals=(*newest.originals, Original(tensor, units, buffer)))
    chain.written = (*earlier, newest)


def _matrix(chain: Chain, module: Any, name: str, *, counted: bool = True) -> Tensor:
    stored = module._parameters[name]
    if hasattr(stored, "full_tensor"):
        raise RecipeError(
            f"the base's {name!r} is split over processes (fully_shard), so nothing can be written into it or taken "
            "out: attach, scale, enable, merge and detach grafts before sharding the model"
        )
    tensor = dense(stored).detach() if counted or is_quantised(stored) else stored.data
    return chain.op.matrix(tensor) if name == chain.tensor else tensor.unsqueeze(-1)


def _put(
    chain: Chain,
    module: Any,
    name: str,
    units: Units,
    values: Tensor,
    *,
    over: Tensor | None = None,
    scale: float = 1.0,
    counted: bool = True,
) -> None:
    """Let the values stand at the units, or ``over + scale * values`` where something lies beneath them."""
    if is_quantised(module._parameters[name]):
        module._parameters[name] = nn.Parameter(_in_format(module._parameters[name], values), requires_grad=False)
        return
    matrix = _matrix(chain, module, name, counted=counted)
    if over is None:
        units.write_(matrix, values.to(matrix.dtype))
    else:
        write_sum_(units, matrix, over, values.detach(), scale)
    stored = module._parameters[name]
    if not stored.is_contiguous() and matrix.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
        # A layout such as channels-last has no matrix view: the copy goes back whole.
        stored.detach().copy_(chain.op.restore(matrix, stored.shape))
