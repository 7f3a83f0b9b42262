"""How much each entry of a graft's own matrices matters before training: the higher, the more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from finegraft.control.run import Run
from finegraft.errors import RecipeError
from finegraft.grafting.slot import Slot
from finegraft.registry import scores

Matrices = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Scored:
    """What scores look at: the training, its matrices by name, and batches."""

    run: Run
    matrices: Matrices
    batches: list[Any]


def data_needed(name: str) -> bool:
    """Whether a score looks at batches."""
    return name == "grasp" or (name not in OWN and scores[name].needs is not None)


def scored(name: str, given: Scored) -> dict[str, Tensor]:
    """The scores of every matrix, by its name."""
    if name in OWN:
        return OWN[name](given)
    sums = _sums(scores[name].needs, given) if data_needed(name) else {}
    found = {}
    for key, matrix in given.matrices.items():
        shape = matrix.shape
        place = SimpleNamespace(
            weight=matrix.detach(), batch=tuple(shape[:-2]), fan_out=shape[-2], fan_in=shape[-1], matrix_shape=shape
        )
        found[key] = scores[name](place, None, given.run.rng("prune", key), sums.get(key)).to(matrix)
    return found


def _sums(need: str, given: Scored) -> dict[str, Tensor]:
    """Gradients of the loss over batches: added up as they are, their sizes or their squares."""
    totals = {key: torch.zeros_like(matrix) for key, matrix in given.matrices.items()}
    for batch in given.batches:
        for key, gradient in zip(totals, _gradients(given, batch), strict=True):
            part = gradient.abs() if need == "absolute" else gradient.square() if need == "square" else gradient
            totals[key] += part
    return totals


def _gradients(given: Scored, batch: Any, *, differentiable: bool = False) -> list[Tensor]:
    own = list(given.matrices.values())
    loss = given.run.loss(batch)  # type: ignore[misc]
    found = torch.autograd.grad(loss, own, create_graph=differentiable, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]


def grasp(given: Scored) -> dict[str, Tensor]:
    """``w * (H g)``, signed, with the gradient over all batches (Wang et al. 2020, arXiv:2002.07376)."""
    own = list(given.matrices.values())
    totals = [torch.zeros_like(matrix) for matrix in own]
    for batch in given.batches:
        totals = [total + g for total, g in zip(totals, _gradients(given, batch), strict=True)]
    products = [torch.zeros_like(matrix) for matrix in own]
    for batch in given.batches:
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones cannot be differentiated twice
            found = _gradients(given, batch, differentiable=True)
            inner = torch.stack([(g * total).sum() for g, total in zip(found, totals, strict=True)]).sum()
            twice = torch.autograd.grad(inner, own, allow_unused=True)
        products = [p if t is None else p + t for p, t in zip(products, twice, strict=True)]
    named = zip(given.matrices.items(), products, strict=True)
    return {key: matrix.detach() * product for (key, matrix), product in named}


def synflow(given: Scored) -> dict[str, Tensor]:
    """``|w dR/dw|`` for the mean output ``R`` of each change alone, made of ``|w|``, for an input of ones.

    Tanaka et al. 2020, arXiv:2006.05467.
    """
    found = {}
    for key, slot in given.run.graft.deltas.items():
        names = [name for name, _ in slot.named_parameters() if f"{key}/{name}" in given.matrices]
        if not names:
            continue
        size = {name: tensor.detach().abs().requires_grad_(name in names) for name, tensor in slot.named_parameters()}
        output = _alone(slot, size, given.run)
        slopes = torch.autograd.grad(output.mean(), [size[name] for name in names], allow_unused=True)
        for name, slope in zip(names, slopes, strict=True):
            found[f"{key}/{name}"] = torch.zeros_like(size[name]) if slope is None else (size[name] * slope).detach()
    return found


def _alone(slot: Slot, tensors: dict[str, Tensor], run: Run) -> Tensor:
    """What a change makes of ones, with tensors in the place of its own, on a layer that gives ones."""
    site = run.graft.placement_of(slot).site
    if slot.delta.reads_weight or site.op.channels != -1 or not site.inputs:
        raise RecipeError(
            f"synflow runs each change on ones, which {slot.delta.kind!r} on {slot.site!r} is no function of"
        )
    like = next(iter(tensors.values()))
    ones = {width: like.new_ones(1, 1, width) for width in (site.inputs, site.channels)}

    class Ones:
        op, module = site.op, site.module

        def __call__(self, x: Tensor) -> Tensor:
            return ones[site.channels]

    kept = {name: buffer.abs() for name, buffer in slot.named_buffers()}
    p = SimpleNamespace(**{**kept, **tensors}, op=slot.op, training=False, site=slot.site, seed=slot.seed)
    return slot.delta.forward(p, Ones(), ones[site.inputs])


def erdos_renyi(given: Scored) -> dict[str, Tensor]:
    """At random, such that smaller matrices keep a greater share, ``(in + out) / (in out)`` of one another's."""
    found = {}
    for key, matrix in given.matrices.items():
        share = sum(matrix.shape[-2:]) / (matrix.shape[-1] * matrix.shape[-2])
        drawn = torch.rand(matrix.shape, generator=given.run.rng("prune", key)).to(matrix)
        found[key] = 1 - drawn / share  # scores above t leave (1 - t) share of the matrix
    return found


OWN = {"grasp": grasp, "synflow": synflow, "erdos-renyi": erdos_renyi}
