"""What scores look at: gradients and inputs of the untouched base on calibration data, one layer at a time.

A gradient is taken up in the moment that backward has made it, and freed. No statistic is kept here: whoever asks for
one gets it piece by piece, batch by batch and site by site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finegraft.errors import FinegraftError, RecipeError, SiteError
from finegraft.locate.site import Site
from finegraft.quantised.stored import is_quantised

Take = Callable[[Site, Tensor], None]

_OF_GRADIENT: dict[str, Callable[[Tensor], Tensor]] = {
    "absolute": torch.abs,
    "signed": lambda gradient: gradient,
    "square": torch.square,
}


def _squares(x: Float[Tensor, "*tokens in"]) -> Float[Tensor, " in"]:
    return x.reshape(-1, x.shape[-1]).square().sum(0)


def _covariance(x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "in in"]:
    """``x^T x``, each sample divided by its largest number, so that none outweighs the others (CorDA)."""
    samples = x.reshape(x.shape[0] if x.ndim > 2 else 1, -1, x.shape[-1])
    largest = samples.amax((-2, -1), keepdim=True).abs().clamp_min(torch.finfo(x.dtype).tiny)
    rows = (samples / largest).flatten(0, 1)
    return rows.mT @ rows


_OF_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {"inputs": _squares, "covariance": _covariance}
"""Of inputs; all others are of gradients."""


def measure(model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], needs: str, take: Take) -> None:
    """One pass over the batches; ``take(site, statistic)`` gets that of each batch, in the order that it is made.

    Backward goes no deeper than the lowest of the sites. The model's flags, gradients and modes are as before
    afterwards, whatever happens. A site that the loss does not depend on is never given.

    Args:
        sites: layers or bare tensors; for inputs linear layers.
        batches: mappings for ``model(**batch)``, with labels where gradients are needed.
        needs: ``absolute``, ``signed``, ``square`` or ``inputs``; see :class:`finegraft.select.scores.Score`. Or the
            ``covariance`` of inputs.
        take: must not keep the tensor, unless it is to stay alive.

    Raises:
        RecipeError: no batch, one that is no mapping or that the model refuses, or no loss that is a finite number.
        SiteError: inputs of a site that takes no vectors.
    """
    if not batches:
        raise RecipeError("calibration is empty; give at least one batch" + _labels(needs))
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise RecipeError(f"a calibration batch must be a mapping for model(**batch), not {type(batch).__name__}")
    if needs in _OF_INPUTS:
        with _at_rest(model), _inputs_met(sites, _OF_INPUTS[needs], take), torch.no_grad():
            for number, batch in enumerate(batches):
                _output(model, batch, number)
        return
    with _at_rest(model), _gradients_met(sites, _OF_GRADIENT[needs], take), torch.enable_grad():
        for number, batch in enumerate(batches):
            loss = _loss(model, batch, number)
            if loss.requires_grad:  # not where it depends on none of the sites
                loss.backward()


def _labels(needs: str) -> str:
    return "" if needs in _OF_INPUTS else " with labels"


def _output(model: nn.Module, batch: Mapping[str, Any], number: int) -> Any:
    try:
        return model(**batch)
    except (FinegraftError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise RecipeError(
            f"{type(model).__name__} refuses calibration batch {number}, which holds {sorted(batch)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _loss(model: nn.Module, batch: Mapping[str, Any], number: int) -> Tensor:
    output = _output(model, batch, number)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise RecipeError(f"the model gives no loss for a calibration batch with {sorted(batch)}; does it hold labels?")
    if loss.numel() != 1 or not bool(loss.isfinite()):
        shown = f"a loss of shape {tuple(loss.shape)}" if loss.numel() != 1 else f"the loss {loss.item()}"
        raise RecipeError(f"the model gives {shown} for calibration batch {number}; scores need one finite number")
    return loss


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and nothing that requires a gradient, within; afterwards all as before."""
    modes = {module: module.training for module in model.modules()}
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    try:
        model.eval()
        for p in flags:
            p.requires_grad_(False)
            p.grad = None
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, (flag, grad) in flags.items():
            p.requires_grad_(flag)
            p.grad = grad


@contextmanager
def _gradients_met(sites: Iterable[Site], statistic: Callable[[Tensor], Tensor], take: Take) -> Iterator[None]:
    hooks = []
    try:
        for site in sites:
            parameter: Any = site.module._parameters[site.tensor]
            if is_quantised(parameter):
                raise SiteError(
                    f"there is no gradient of {site.name!r}, whose weight is quantised: take one of the dense base "
                    "(fg.dequantise), or a method that needs none"
                )
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(_gradient_taker(site, statistic, take)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gradient_taker(site: Site, statistic: Callable[[Tensor], Tensor], take: Take) -> Any:
    @torch.no_grad()
    def on_gradient(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        take(site, statistic(_precise(site.op.matrix(gradient))))

    return on_gradient


@contextmanager
def _inputs_met(sites: Iterable[Site], statistic: Callable[[Tensor], Tensor], take: Take) -> Iterator[None]:
    hooks = []
    try:
        for site in sites:
            if site.type != "linear":
                raise SiteError(f"scores by inputs are for linear layers; {site.name!r} is a {site.type} site")
            taker = _input_taker(site, statistic, take)
            hooks.append(site.module.register_forward_pre_hook(taker, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _input_taker(site: Site, statistic: Callable[[Tensor], Tensor], take: Take) -> Any:
    def on_input(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else named["input"]
        take(site, statistic(_precise(x.detach())))

    return on_input


def _precise(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
