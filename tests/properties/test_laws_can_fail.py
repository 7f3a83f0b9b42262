"""For every law a fault of the engine or of a kind that breaks it: a law that cannot fail says nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finegraft.deltas.bottleneck import Bottleneck
from finegraft.deltas.delta import Delta
from finegraft.deltas.full import Full
from finegraft.deltas.low_rank import LowRank
from finegraft.errors import FinegraftError, NotMergeable
from finegraft.grafting import attachment, stack, writing
from finegraft.grafting.chain import Chain
from finegraft.grafting.graft import Graft
from finegraft.grafting.layers import ScaledLayer, stacked
from finegraft.grafting.splitting import Split
from finegraft.grafting.stack import Stack
from finegraft.grafting.standing import Standing
from finegraft.locate import low_rank_linear
from finegraft.select.units import Units
from finegraft.testing.bases import BASES
from finegraft.testing.conformance import hold
from finegraft.testing.laws import LAWS

Patch = pytest.MonkeyPatch
Sabotage = Callable[[Patch], None]

FAULTS: dict[str, tuple[str, str, Sabotage]] = {}
"""By law: a kind, a base, and a fault that the law must notice there."""

_GRAFT = import_module("finegraft.grafting.graft")
_MOVING = import_module("finegraft.grafting.moving")
_LAWS = {law.name: law for law in LAWS}
_BASES = {base.name: base for base in BASES}


def fault(law: str, kind: str = "low-rank", base: str = "linear") -> Callable[[Sabotage], Sabotage]:
    def file(sabotage: Sabotage) -> Sabotage:
        FAULTS[law] = (kind, base, sabotage)
        return sabotage

    return file


def change_forward(patch: Patch, change: Callable[..., torch.Tensor], kind: type[Delta] = LowRank) -> None:
    """Let a kind give ``change(y, z, x)`` for the layer's output ``y``, the true output ``z`` and the input ``x``."""
    true = kind.forward
    patch.setattr(kind, "forward", lambda self, p, layer, x: change(layer(x), true(self, p, layer, x), x))


def skip(*args: Any, **kwargs: Any) -> None:
    return None


@fault("a_fresh_graft_is_the_identity")
def starts_elsewhere(patch):
    true = LowRank.initial
    patch.setattr(
        LowRank, "initial", lambda self, site, rng: {n: t + (n in "ab") for n, t in true(self, site, rng).items()}
    )


@fault("a_trained_graft_changes_outputs")
def never_acts(patch):
    patch.setattr(Chain, "acts", False)


@fault("forward_agrees_with_weight_in_single_precision")
def a_little_too_much(patch):
    change_forward(patch, lambda y, z, x: y + 1.001 * (z - y))


@fault("forward_agrees_with_weight_in_double_precision")
def computes_in_single(patch):
    change_forward(patch, lambda y, z, x: z.float().to(z.dtype))


@fault("forward_agrees_with_weight_in_bfloat16")
def loses_half_numbers(patch):
    change_forward(patch, lambda y, z, x: y if x.dtype == torch.bfloat16 else z)


@fault("gradients_agree_with_those_through_the_weight")
def gradients_of_half_the_change(patch):
    change_forward(patch, lambda y, z, x: y + ((z - y) + (z - y).detach()) / 2)


@fault("gradients_are_derivatives", "bottleneck")
def gradients_of_twice_the_change(patch):
    change_forward(patch, lambda y, z, x: y + 2 * (z - y) - (z - y).detach(), Bottleneck)


@fault("gradients_in_training_are_derivatives")
def another_mask_in_backward(patch):
    true, calls = low_rank_linear._dropped, []
    patch.setattr(
        low_rank_linear, "_dropped", lambda x, dropout, seed: true(x, dropout, seed + len(calls.append(1) or calls))
    )


@fault("scale_zero_is_the_base")
def scale_is_ignored(patch):
    patch.setattr(ScaledLayer, "__call__", lambda self, x: stacked(self._slots, self._below)(x))


@fault("scale_is_linear_in_the_weight")
def scale_is_squared_on_merging(patch):
    true = writing.changed_weight
    squared = lambda group, w: true(SimpleNamespace(slots=group.slots, scale=group.scale**2), w)  # noqa: E731
    patch.setattr(writing, "changed_weight", squared)


@fault("merging_changes_no_output")
def merges_too_much(patch):
    true = writing.changed_weight
    patch.setattr(writing, "changed_weight", lambda group, w: w + 1.001 * (true(group, w) - w))


@fault("unmerging_restores_every_bit")
def keeps_rounded_originals(patch):
    true = Chain.register_buffer

    def register(self, name, tensor, persistent=True):
        true(self, name, tensor.to(torch.float16).to(tensor.dtype), persistent)

    patch.setattr(Chain, "register_buffer", register)


@fault("detaching_restores_every_bit")
def leaves_its_class(patch):
    patch.setattr(stack, "let_go", skip)


@fault("what_cannot_merge_says_so_and_changes_nothing", "bottleneck")
def refuses_without_a_word(patch):
    def refuse(self, graft):
        raise NotMergeable("no")

    patch.setattr(Stack, "check_mergeable", refuse)


@fault("merging_for_good_leaves_a_plain_model")
def leaves_its_class_on_merging(patch):
    patch.setattr(stack, "let_go", skip)


@fault("a_saved_graft_loads_to_the_same_outputs")
def saves_in_half_precision(patch):
    true = _GRAFT.write
    halved = lambda path, tensors, *args, **kwargs: true(  # noqa: E731
        path, {n: t.bfloat16().to(t.dtype) if t.is_floating_point() else t for n, t in tensors.items()}, *args, **kwargs
    )
    patch.setattr(_GRAFT, "write", halved)


@fault("declared_counts_are_actual_counts")
def counts_one_more(patch):
    true = Delta.count
    patch.setattr(Delta, "count", lambda self, site: true(self, site) + 1)


@fault("state_round_trips")
def state_leaves_out_the_last_bits(patch):
    true = Graft.state
    patch.setattr(Graft, "state", lambda self: {n: t.bfloat16().to(t.dtype) for n, t in true(self).items()})


@fault("gradients_reach_trained_tensors_and_nothing_else")
def the_base_is_not_frozen(patch):
    true = Stack.add

    def add(self, graft):
        true(self, graft)
        self.model.requires_grad_(True)

    patch.setattr(Stack, "add", add)


@fault("training_lowers_the_loss")
def gradients_point_up(patch):
    change_forward(patch, lambda y, z, x: y + 2 * (z - y).detach() - (z - y))


@fault("resumed_training_gives_the_same_bits")
def state_is_rounded(patch):
    state_leaves_out_the_last_bits(patch)


@fault("moved_units_leave_the_base_right", "sparse")
def dropped_units_are_forgotten(patch):
    true = _MOVING.Graft.put
    none = lambda tensor: tensor[..., :0] if tensor.ndim > 1 else tensor[:0]  # noqa: E731

    def put(self, slot, tensors):
        settled = {name: none(tensors[name]) for name in ("settled_index", "settled_values")}
        true(self, slot, {**tensors, **settled})

    patch.setattr(_MOVING.Graft, "put", put)


@fault("frozen_changes_stay_and_cost_nothing", "full")
def the_last_step_is_not_written(patch):
    patch.setattr(_MOVING, "refresh", skip)


@fault("new_values_are_seen_however_they_are_set", "full")
def written_once(patch):
    patch.setattr(attachment, "refresh", skip)


@fault("gradients_accumulate")
def gradients_depend_on_the_batch(patch):
    change_forward(patch, lambda y, z, x: y + (z - y) * len(x))


@fault("exactly_the_chosen_entries_differ", "sparse")
def writes_beside(patch):
    true = Units.write_

    def write(self, matrix, values):
        true(self, matrix, values)
        matrix[..., -1, -1] += 1

    patch.setattr(Units, "write_", write)


@fault("weight_decay_pulls_towards_the_base", "full")
def trains_what_is_not_the_change(patch):
    true = Full.changes
    patch.setattr(Full, "changes", lambda self, p: [replace(c, values=c.values + 0.1) for c in true(self, p)])


@fault("a_copy_is_equal_and_independent")
def copies_share_the_grafts(patch):
    patch.setattr(Stack, "__deepcopy__", lambda self, memo: self, raising=False)


@fault("compiling_changes_nothing")
def branches_on_data(patch):
    change_forward(patch, lambda y, z, x: z if float(z.sum()) < 1e9 else y)


@fault("checkpointing_changes_no_gradient")
def another_result_when_computed_again(patch):
    calls = []
    change_forward(patch, lambda y, z, x: y + (z - y) * len(calls.append(1) or calls))


@fault("autocast_stays_close")
def forgets_the_change_under_autocast(patch):
    change_forward(patch, lambda y, z, x: 2 * z if torch.is_autocast_enabled("cpu") else z)


@fault("casting_there_and_back_works")
def doubles_in_bfloat16(patch):
    change_forward(patch, lambda y, z, x: 2 * z if x.dtype == torch.bfloat16 else z)


@fault("grafts_of_other_kinds_mix", "scale-shift")
def acts_in_the_wrong_order(patch):
    true = Chain._through
    patch.setattr(Chain, "_through", lambda self, groups, layer: true(self, tuple(reversed(groups)), layer))


@fault("grafts_switch_one_by_one")
def cannot_be_switched_off(patch):
    patch.setattr(Graft, "enabled", property(lambda self: True, skip))


@fault("removing_one_graft_leaves_the_others", "full")
def originals_are_put_back_first_to_last(patch):
    def restore(chain, module):
        chain.written = tuple(reversed(chain.written))
        true(chain, module)

    true = writing.restore
    patch.setattr(writing, "restore", restore)


@fault("new_values_of_every_graft_are_seen", "sparse")
def written_once_among_others(patch):
    written_once(patch)


@fault("compiling_several_grafts_changes_nothing", "full")
def changes_beneath_are_as_they_were_written(patch):
    true = Standing.__init__

    def begin(self, *args, **kwargs):
        true(self, *args, **kwargs)
        self._trains = self._trains[-1:]

    patch.setattr(Standing, "__init__", begin)


@fault("a_saved_mix_loads_to_the_same_outputs")
def a_mix_is_saved_in_half_precision(patch):
    saves_in_half_precision(patch)


@fault("every_sample_can_have_its_own_graft", base="expert-stack")
def samples_come_back_in_the_order_of_the_parts(patch):
    patch.setattr(Split, "_in_order", lambda self, found, repeat: torch.cat(list(found)))


def test_every_law_has_its_fault():
    assert set(FAULTS) == set(_LAWS)


@pytest.mark.parametrize("law", FAULTS)
def test_fault_is_noticed(law, monkeypatch):
    kind, base, sabotage = FAULTS[law]
    hold(_LAWS[law], kind, _BASES[base])
    sabotage(monkeypatch)
    with pytest.raises((AssertionError, FinegraftError, RuntimeError)):
        hold(_LAWS[law], kind, _BASES[base])


def test_routing_by_layer_is_checked_too(monkeypatch):
    law = _LAWS["every_sample_can_have_its_own_graft"]
    true = Chain.take

    def first_route_for_all(self, groups, routes, samples):
        rows = [row for own, _ in routes for row in own]
        true(self, groups, [(rows, routes[0][1])] if routes else routes, samples)

    monkeypatch.setattr(Chain, "take", first_route_for_all)
    with pytest.raises(AssertionError):
        hold(law, "low-rank", _BASES["linear"])
