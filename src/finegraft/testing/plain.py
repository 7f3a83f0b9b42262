"""The plain path: a base that runs on the weights that changes say they stand for, with nothing attached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from finegraft.grafting.graft import Graft
from finegraft.grafting.slot import Slot
from finegraft.locate.collection import Sites
from finegraft.locate.find import sites
from finegraft.locate.site import Site


def plainly(base: nn.Module, grafts: Sequence[tuple[Graft, float]]) -> Callable[..., Any]:
    """The function of a bare base under the effective weights of grafts, each at a scale, the first innermost.

    Gradients reach the grafts' trained tensors through :meth:`~finegraft.deltas.delta.Delta.weight` and
    :meth:`~finegraft.deltas.delta.Delta.bias` alone.

    Args:
        base: an untouched model of the kind that the grafts are on.
        grafts: grafts of mergeable kinds, attached to another model.
    """
    found = sites(base, roles=grafts[0][0].recipe.roles if grafts else None)

    def run(**batch: Any) -> Any:
        tensors, added = _effective(found, grafts)
        return _run(base, tensors, added, batch)

    return run


Added = list[tuple[Site, Tensor]]


def _effective(found: Sites, grafts: Sequence[tuple[Graft, float]]) -> tuple[dict[str, Tensor], Added]:
    """The tensors that take the place of the base's, and biases for layers that store none."""
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor | None] = {}
    for graft, scale in grafts:
        for placement in graft.placements:
            site = found[placement.site.name]
            w, b = weights.get(site.name, site.weight), biases.get(site.name, _detached(site.bias))
            weights[site.name], biases[site.name] = _changed(placement.slots, scale, w, b)
    tensors: dict[str, Tensor] = {}
    added: Added = []
    for name, weight in weights.items():
        site, bias = found[name], biases[name]
        tensors[_full(site, site.tensor)] = site.op.restore(weight, site.shape)
        if bias is not None and site.bias is not None:
            tensors[_full(site, "bias")] = bias
        elif bias is not None:
            added.append((site, bias))
    return tensors, added


def _changed(slots: Sequence[Slot], scale: float, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    weight, bias = w, b
    for slot in slots:
        beneath = weight
        weight = slot.delta.weight(slot, beneath)
        bias = slot.delta.bias_over(slot, bias, lambda beneath=beneath: beneath)
    scale = scale if all(slot.delta.scalable for slot in slots) else 1.0
    if bias is not None:
        before = torch.zeros_like(bias) if b is None else b
        bias = before + scale * (bias - before)
    return w + scale * (weight - w), bias


def _run(base: nn.Module, tensors: dict[str, Tensor], added: Added, batch: dict[str, Any]) -> Any:
    def adder(site: Site, bias: Tensor) -> Any:
        return lambda module, args, y: y + site.op.on_channels(bias, y)

    hooks = [site.module.register_forward_hook(adder(site, bias)) for site, bias in added]
    try:
        return functional_call(base, tensors, (), batch)
    finally:
        for hook in hooks:
            hook.remove()


def _full(site: Site, attribute: str) -> str:
    path = site.name if site.kind == "layer" else site.name.removesuffix(site.tensor).removesuffix(".")
    return f"{path}.{attribute}" if path else attribute


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
