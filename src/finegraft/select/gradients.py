"""Gradients of the untouched base on calibration data, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.errors import RecipeError
from finegraft.locate.site import Site


def gradient_sums(model: nn.Module, sites: list[Site], calibration: Iterable[Any]) -> dict[str, Tensor]:
    """``sum_batches |dL/dW|`` for each site, canonical shape ``(*batch, out, in)``, by site name.

    A gradient is taken up and freed as soon as backward has made it. Gradients, flags and mode of the model stay as
    they were.

    Args:
        calibration: batches, mappings with labels for ``model(**batch)``, which must give a loss.

    Raises:
        RecipeError: no batch, or a model that gives no loss for one.
    """
    sums = {site.name: torch.zeros_like(site.weight) for site in sites}
    flags = {p: p.requires_grad for p in model.parameters()}
    mode = model.training
    hooks = []
    try:
        model.eval()
        for p in flags:
            p.requires_grad_(False)
        for site in sites:
            parameter: Any = site.module._parameters[site.tensor]
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(_adder(site, sums[site.name])))
        batches = 0
        for batch in calibration:
            _loss(model, batch).backward()
            batches += 1
        if not batches:
            raise RecipeError("calibration is empty; give at least one batch with labels")
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in flags.items():
            p.requires_grad_(flag)
        model.train(mode)
    return sums


def _adder(site: Site, total: Tensor) -> Any:
    def add(parameter: nn.Parameter) -> None:
        total.add_(site.op.matrix(parameter.grad).abs())
        parameter.grad = None

    return add


def _loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise RecipeError(f"a calibration batch must be a mapping for model(**batch), not {type(batch).__name__}")
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise RecipeError(f"the model gives no loss for a calibration batch with {sorted(batch)}; does it hold labels?")
    return loss
