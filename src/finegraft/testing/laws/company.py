"""Several grafts on one model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.deltas.delta import Delta
from finegraft.errors import SiteError
from finegraft.grafting.choosing import matched
from finegraft.grafting.graft import Graft
from finegraft.grafting.load import load
from finegraft.grafting.merging import grafts
from finegraft.grafting.route import route
from finegraft.locate.find import sites
from finegraft.locate.site import Site
from finegraft.recipe import Recipe
from finegraft.registry import kinds
from finegraft.testing.bases import leading
from finegraft.testing.bits import snapshot, stored, unchanged
from finegraft.testing.case import Case, all_close, attach, close, identical, only, outputs, probe, says
from finegraft.testing.laws.agreement import DOUBLE, SINGLE
from finegraft.testing.laws.law import law, law_where, slow_law
from finegraft.testing.plain import plainly

_COMPANIONS = ("low-rank", "bottleneck", "scale-shift", "prefix", "prompt")
"""Kinds to be put beside the one under test, the first that is defined on its site."""

_SMALL: dict[str, dict[str, Any]] = {
    "low-rank": {"rank": 1},
    "bottleneck": {"width": 2, "init": "bert"},
    "prefix": {"length": 2},
    "prompt": {"length": 2},
}


def companion(case: Case) -> Recipe:
    """A recipe of another kind, for the very sites of a case; for linear layers where it has none."""
    if not case.recipe.parts:
        return Recipe.parse(
            {"parts": [{"where": {"type": "linear", "role": "!head"}, "what": {"kind": "low-rank"}}], "heads": "none"}
        )
    model, _ = case.base.build()
    parts = []
    for part in case.recipe.parts:
        found = matched(part, sites(model, roles=case.recipe.roles))
        fitting = (kinds[name](**_SMALL.get(name, {})) for name in _COMPANIONS)
        delta = next(delta for delta in fitting if all(_fits(delta, site) for site in found))
        parts.append(part.model_copy(update={"what": (delta,), "select": None, "instead": None}))
    return Recipe(name="companion", parts=tuple(parts), heads="none", roles=case.recipe.roles)


def _fits(delta: Delta, site: Site) -> bool:
    try:
        delta.fits(site)
    except SiteError:
        return False
    return True


def _some_pair(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any], list[Graft]]:
    """A model with both grafts, in whichever order they go together."""
    pair = _pair(case, swapped=False, dtype=dtype) or _pair(case, swapped=True, dtype=dtype)
    assert pair is not None, "the two kinds go together in no order"
    return pair


def _pair(
    case: Case, *, swapped: bool, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any], list[Graft]] | None:
    """A model with both grafts, trained; None where the lower one has no weight that the upper one needs."""
    model, batch = case.base.build(dtype)
    recipes = [case.recipe, companion(case)]
    found: list[Graft] = []
    for recipe in reversed(recipes) if swapped else recipes:
        before = snapshot(model)
        try:
            found.append(attach(model, batch, recipe, case.seed))
        except SiteError as error:
            says(error, "needs the weight beneath")
            unchanged(snapshot(model), before)
            return None
        case.disturb(found[-1], seed=len(found))
    return model, batch, found


@law
def grafts_of_other_kinds_mix(case: Case) -> None:
    """A graft above or below one of another kind acts on what the lower makes; an order without meaning is refused."""
    mixed = 0
    for swapped in (False, True):
        pair = _pair(case, swapped=swapped, dtype=torch.float64)
        if pair is None:
            continue
        mixed += 1
        model, batch, both = pair
        assert grafts(model) == both
        assert torch.isfinite(outputs(model, batch)).all()
        if all(slot.delta.mergeable for graft in both for slot in graft.deltas.values()):
            for scales in ((1.0, 1.0), (0.5, -1.0)):
                for graft, scale in zip(both, scales, strict=True):
                    graft.scale = scale
                base, _ = case.base.build(torch.float64)
                plain = plainly(base, list(zip(both, scales, strict=True)))
                close(outputs(model, batch), outputs(plain, batch), DOUBLE, f"outputs at scales {scales}")
    assert mixed, "no order of the two kinds works"


@law
def grafts_switch_one_by_one(case: Case) -> None:
    """With two grafts on a model, each alone, both, or none give what a model with just these gives, to the bit."""
    model, batch, both = _some_pair(case)
    for active in ([], both[:1], both[1:], both):
        base, _ = case.base.build()
        for graft in active:
            copied = attach(base, batch, graft.recipe, graft.seed)
            copied.load_state(graft.state())
        with only(both, active):
            identical(outputs(model, batch), outputs(base, batch), f"outputs with {len(active)} of 2 grafts")


@law
def removing_one_graft_leaves_the_others(case: Case) -> None:
    """Three grafts, two of one kind: whichever is taken off, the others act as if it had never been there."""
    for gone in range(3):
        model, batch = case.base.build()
        before = snapshot(model)
        pair = _three(case, model, batch)
        if pair is None:
            return
        staying = [graft for graft in pair if graft is not pair[gone]]
        with only(pair, staying):
            expected = outputs(model, batch)
        pair[gone].detach()
        close(outputs(model, batch), expected, 0.0)
        for graft in staying:
            graft.detach()
        unchanged(snapshot(model), before)


def _three(case: Case, model: nn.Module, batch: dict[str, Any]) -> list[Graft] | None:
    found = []
    for number, recipe in enumerate((case.recipe, case.recipe, companion(case))):
        try:
            found.append(attach(model, batch, recipe, case.seed + number))
        except SiteError as error:
            says(error, "needs the weight beneath")
            return None
        case.disturb(found[-1], seed=number)
        outputs(model, batch)
    return found


@law
def new_values_of_every_graft_are_seen(case: Case) -> None:
    """With three grafts on a site, forward runs on the values of each as they are, whichever changed, and however."""
    model, batch = case.base.build()
    three = _three(case, model, batch)
    if three is None:
        return
    for changed in ([1], [0, 2]):
        for number in changed:
            for parameter in three[number].parameters():
                parameter.data.mul_(0.5) if number else parameter.detach().mul_(0.5)
        close(outputs(model, batch), _afresh(case, three), SINGLE, f"outputs after changes of {changed}")


@law_where(lambda case: any(delta.in_place for delta in case.kinds), slow=True)
def compiling_several_grafts_changes_nothing(case: Case) -> None:
    """Three grafts in one compiled graph, two of them in the same tensors, act with their values of the moment."""
    model, batch = case.base.build()
    three = _three(case, model, batch)
    if three is None:
        return
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        close(outputs(compiled, batch), _afresh(case, three), SINGLE)
        for graft in three:
            case.disturb(graft)


def _afresh(case: Case, three: list[Graft]) -> Tensor:
    """Outputs of a fresh model with grafts of the same values."""
    model, batch = case.base.build()
    for graft, twin in zip(three, _three(case, model, batch) or [], strict=True):
        with twin.disabled():
            twin.load_state(graft.state())
    return outputs(model, batch)


@slow_law
def a_saved_mix_loads_to_the_same_outputs(case: Case) -> None:
    """Two grafts saved one by one and loaded in order give the outputs of the two together, to the bit."""
    for swapped in (False, True):
        pair = _pair(case, swapped=swapped)
        if pair is None:
            continue
        model, batch, both = pair
        base, _ = case.base.build()
        with tempfile.TemporaryDirectory() as folder:
            for number, graft in enumerate(both):
                load(graft.save(Path(folder) / str(number)), base, trainable=True)
        identical(outputs(base, batch), outputs(model, batch))


def _finest(case: Case) -> torch.dtype:
    """Float64 where the base computes in it: sums of a single sample run in another order, which float32 shows."""
    model, batch = case.base.build(torch.float64)
    try:
        outputs(model, batch)
    except RuntimeError:  # such as experts by grouped products
        return torch.float32
    return torch.float64


@law
def every_sample_can_have_its_own_graft(case: Case) -> None:
    """Each sample of a routed batch gets the outputs, and gives the gradients, that it would alone with its grafts."""
    model, batch, both = _some_pair(case, _finest(case))
    weights = probe(outputs(model, batch))
    before = stored(model)
    for pattern in ((both[:1], []), (both, both[1:])):
        _assert_as_alone(model, batch, both, [pattern[i % 2] for i in range(len(weights))], weights)
    unchanged(stored(model), before)


def _assert_as_alone(
    model: nn.Module, batch: dict[str, Any], both: list[Graft], wanted: list[list[Graft]], weights: Tensor
) -> None:
    alone: list[Tensor] = []
    expected: dict[str, Tensor] = {}
    for sample, active in enumerate(wanted):
        own = {n: v[sample : sample + 1] if isinstance(v, Tensor) else v for n, v in batch.items()}
        with only(both, active):
            y, grads = _step(model, own, weights[sample : sample + 1], both)
        alone.append(y)
        for name, grad in grads.items():
            expected[name] = expected.get(name, 0) + grad
    with route(model, wanted):
        together, found = _step(model, batch, weights, both)
    close(together, torch.cat(alone), SINGLE)
    all_close(found, expected, SINGLE)


def _step(
    model: nn.Module, batch: dict[str, Any], weights: Tensor, both: list[Graft]
) -> tuple[Tensor, dict[str, Tensor]]:
    trained = {f"{i} {name}": p for i, graft in enumerate(both) for name, p in graft.named_parameters()}
    y = leading(model(**batch))
    if not y.requires_grad:
        return y, {}
    found = torch.autograd.grad((y * weights).sum(), list(trained.values()), allow_unused=True)
    return y.detach(), {n: g for n, g in zip(trained, found, strict=True) if g is not None}
