"""Making the linear layers of a base smaller, and dense again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from finegraft.errors import RecipeError, SiteError
from finegraft.grafting.choosing import as_list
from finegraft.grafting.stack import bare, stack_of
from finegraft.inits.remainder import Importance, split
from finegraft.locate.find import sites
from finegraft.locate.site import Site
from finegraft.quantised.budget import cheapest_error
from finegraft.quantised.quantiser import Quantiser
from finegraft.quantised.stored import dense, is_quantised
from finegraft.quantised.tensor import QuantisedTensor
from finegraft.recipe.part import Where
from finegraft.recipe.spec import explain
from finegraft.registry import quantisers
from finegraft.select.statistics import measure

Format = str | Mapping[str, Any] | Quantiser

WHERE = {"type": "linear", "role": ["!head?", "!lm_head?", "!router?"]}
"""All linear layers but heads, output layers and routers."""
FORMATS: tuple[Format, ...] = tuple(
    {"kind": "nf4", "width": width, "block": block} for width in (2, 3, 4, 8) for block in (16, 32, 64)
)
"""What a budget of bits chooses from."""


def quantise(
    model: nn.Module,
    to: Format | Sequence[Format] = "nf4",
    *,
    where: Mapping[str, Any] | None = None,
    bits: float | None = None,
    rank: int | None = None,
    start: str = "factors",
    steps: int = 100,
    calibration: Iterable[Any] | None = None,
) -> nn.Module:
    """Keep weights of linear layers in fewer bits, in place; grafts then train on what is left of the base.

    ``rank`` takes factors out of each weight before it is rounded (LQ-LoRA, LoftQ), in which methods ``lq-lora`` and
    ``loftq`` start. The same call on the same base gives the same base again, on which its grafts load.

    Args:
        model: the base, without grafts.
        to: a format by name (``nf4``, ``int8``, ``int4``, or yours), with settings as data, or as a
            :class:`~finegraft.quantised.quantiser.Quantiser`; with ``bits``, the formats to choose from.
        where: a query as in recipes; by default all linear layers but heads, output layers and routers.
        bits: on average for each number, codes and scales, low-rank factors not counted; each weight then gets a format
            of its own, chosen by integer programming.
        rank: of the factors taken out; None for none.
        start: ``factors`` or ``codes``: what the alternation begins with, as LQ-LoRA or as LoftQ does.
        steps: the most alternations; it ends when the error no longer falls.
        calibration: batches with labels, whose squared gradients weigh the errors (Fisher information, as means over
            rows and columns); without them all errors weigh the same.

    Raises:
        RecipeError: the model carries grafts, an unknown format or setting, or a budget that is too small.
        SiteError: nothing matches, or a weight is quantised, shared or not finite. The model is untouched then.
    """
    model = bare(model)
    if stack_of(model) is not None:
        raise RecipeError("the model carries grafts: quantise the base first, then graft it")
    _check_numbers(start, steps, rank, bits)
    formats = _formats(to, choose=bits is not None)
    if len(formats) > 1 and bits is None:
        raise RecipeError("several formats need a budget: give bits=, the average for each number")
    found = list(sites(model).where(**(WHERE if where is None else _query(where))))
    _check(found, formats, rank)
    weights = {} if calibration is None else _importance(model, found, as_list(calibration))
    way = _Way(rank, steps, start == "factors", weights)
    chosen = [formats[0]] * len(found) if bits is None else _within(bits, found, formats, way)
    made = [way.made(site, quantiser)[0] for site, quantiser in zip(found, chosen, strict=True)]
    for site, held in zip(found, made, strict=True):
        site.module._parameters[site.tensor] = nn.Parameter(held, requires_grad=False)
    return model


@dataclass(frozen=True)
class _Way:
    """How weights become codes, and perhaps factors."""

    rank: int | None
    steps: int
    factors_first: bool
    weights: Mapping[str, Importance]

    def made(self, site: Site, quantiser: Quantiser) -> tuple[QuantisedTensor, float]:
        """The weight in a format, and the weighted square of its error."""
        w, importance = site.weight, self.weights.get(site.name)
        if self.rank is not None:
            first = self.factors_first
            parts = split(w, quantiser, self.rank, importance=importance, steps=self.steps, factors_first=first)
            return parts.quantised, parts.error**2
        held = QuantisedTensor.of(w, quantiser)
        error = (w.float() - held.dequantize().float()).square()
        if importance is not None:
            error = importance.rows.unsqueeze(-1) * error * importance.columns
        return held, float(error.sum())


def dequantise(model: nn.Module) -> nn.Module:
    """Make quantised weights of ``nn.Linear`` dense, in place: the numbers they stand for stay as they are.

    They stay frozen, as they were; ``requires_grad_`` lets a loop without grafts train them.

    Raises:
        RecipeError: the model carries grafts.
    """
    model = bare(model)
    if stack_of(model) is not None:
        raise RecipeError("the model carries grafts, which belong to the quantised base: detach them first")
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if is_quantised(parameter):
                module._parameters[name] = nn.Parameter(dense(parameter, module).clone(), requires_grad=False)
    return model


def _check_numbers(start: Any, steps: Any, rank: Any, bits: Any) -> None:
    if start not in ("factors", "codes"):
        raise RecipeError(f"start is 'factors' or 'codes', not {start!r}")
    for name, number in (("steps", steps), ("rank", 1 if rank is None else rank)):
        if type(number) is not int or number < 1:
            raise RecipeError(f"{name} is a whole number of at least 1, not {number!r}")
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0 < bits < math.inf):
        raise RecipeError(f"bits is a number above 0, the average for each number of a weight, not {bits!r}")


def _check(found: Sequence[Site], formats: Sequence[Quantiser], rank: int | None) -> None:
    for site in found:
        _require_plain(site, rank)
        for quantiser in formats:
            quantiser.fits(site.name, site.shape)
    for site in {site.shape: site for site in found}.values():
        for quantiser in formats:
            _try_out(quantiser, site)


def _query(where: Any) -> dict[str, Any]:
    if not isinstance(where, Mapping):
        raise RecipeError(f"where is a query as in recipes, such as {{'role': ['q', 'v']}}, not {where!r}")
    try:
        return Where.model_validate(dict(where)).model_dump()
    except ValidationError as error:
        raise RecipeError(explain(error, "where")) from None


def _require_plain(site: Site, rank: int | None) -> None:
    if site.type != "linear" or type(site.module) is not nn.Linear:
        raise SiteError(f"{site.name!r} is a {type(site.module).__name__}: quantise layers of nn.Linear")
    if is_quantised(site.parameter):
        raise SiteError(f"{site.name!r} is quantised already: make it dense first (fg.dequantise)")
    if site.weight.is_meta:
        raise SiteError(f"{site.name!r} has no numbers, it is on the meta device: load the base's weights first")
    if not bool(site.weight.isfinite().all()):
        raise SiteError(f"{site.name!r} has a weight that is not a finite number everywhere, which no format holds")
    if site.aliases:
        raise SiteError(f"{site.name!r} shares its weight with {site.aliases[0][0]!r}: leave it out by where=")
    if rank is not None and rank > min(site.shape):
        raise SiteError(f"{site.name!r} is {site.shape}: take out factors of a rank of at most {min(site.shape)}")


def _try_out(quantiser: Quantiser, site: Site) -> None:
    """Raise :class:`SiteError` where a format does not give a weight back."""
    codes = quantiser.quantise(site.weight.detach().float())
    if not isinstance(codes, dict) or not codes or not all(isinstance(code, Tensor) for code in codes.values()):
        raise SiteError(f"{quantiser!r}: quantise gives a dict of tensors by name, at least one, not {codes!r:.200}")
    back = quantiser.dequantise(codes, tuple(site.shape))
    if not isinstance(back, Tensor) or back.shape != site.shape or not bool(back.isfinite().all()):
        found = tuple(back.shape) if isinstance(back, Tensor) else type(back).__name__
        raise SiteError(
            f"{quantiser!r}: dequantise gives back a matrix of finite numbers, of shape {tuple(site.shape)} for "
            f"{site.name!r}, not {found}"
        )


def _formats(to: Format | Sequence[Format], *, choose: bool) -> list[Quantiser]:
    if choose and to == "nf4":
        to = FORMATS
    if not isinstance(to, Sequence) or isinstance(to, str):
        return [_format(to)]
    if not to:
        raise RecipeError("no format is given: name one, or several with bits=")
    return [_format(one) for one in to]


def _format(given: Any) -> Quantiser:
    if isinstance(given, Quantiser):
        return given
    if not isinstance(given, (str, Mapping)):
        raise RecipeError(
            f"a format is a name ({', '.join(quantisers)}), settings as data, or a Quantiser, not {given!r}"
        )
    data = {"kind": given} if isinstance(given, str) else dict(given)
    name = str(data.pop("kind", ""))
    own: Any = quantisers[name]
    if not (isinstance(own, type) and issubclass(own, Quantiser)):
        raise RecipeError(f"quantiser {name!r} is no subclass of finegraft.quantised.quantiser.Quantiser")
    try:
        made: Quantiser = own.model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error, f"quantiser {name!r}")) from None
    return made


def _within(bits: float, found: Sequence[Site], formats: Sequence[Quantiser], way: _Way) -> list[Quantiser]:
    errors: list[list[float]] = []
    costs: list[list[float]] = []
    for site in found:
        tried = [way.made(site, quantiser) for quantiser in formats]
        errors.append([error for _, error in tried])
        size = site.fan_out * site.fan_in
        costs.append([q.bits(t.codes, site.shape) * size for q, (t, _) in zip(formats, tried, strict=True)])
    numbers = sum(site.fan_out * site.fan_in for site in found)
    return [formats[number] for number in cheapest_error(errors, costs, bits * numbers)]


def _importance(model: nn.Module, found: Sequence[Site], batches: Sequence[Any]) -> dict[str, Importance]:
    """Means over rows and columns of the squared gradients, scaled so that their product has a mean of about one."""
    sums: dict[str, list[Tensor]] = {}

    def take(site: Site, squares: Tensor) -> None:
        parts = [squares.mean(-1), squares.mean(-2)]
        before = sums.get(site.name, [torch.zeros_like(part) for part in parts])
        sums[site.name] = [a + b for a, b in zip(before, parts, strict=True)]

    measure(model, found, batches, "square", take)
    floor = torch.finfo(torch.float32).tiny
    return {
        name: Importance(*(part / part.mean().clamp_min(floor) for part in parts))
        for name, parts in sums.items()
        if all(bool(part.any()) for part in parts)
    }
