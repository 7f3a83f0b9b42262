"""Methods whose selection moves: what their papers' sheets say can be checked."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import finegraft as fg
from finegraft.control.grow_and_prune import GrowAndPrune
from finegraft.control.recurring import Recurring
from finegraft.errors import RecipeError
from finegraft.grafting.make import resolve
from finegraft.recipe import Recipe
from finegraft.testing.bases import TASKS
from finegraft.testing.case import Case
from finegraft.testing.loop import Loop
from tests.train.test_trainer import assert_same, interrupted_after, trainer_in

(TEXT, _) = TASKS
METHODS = ("lift", "sara", "sft-ag", "sft-ma", "lt-sft")


def loop_of(recipe: Recipe | str, *, steps: int = 12, **settings: Any) -> Loop:
    recipe = resolve(recipe, **settings)
    trial = Case(TEXT, recipe).start()
    return Loop(trial, lambda batch: trial.model(**batch)["loss"], steps=steps, weight_decay=None)


def slots_of(loop: Loop):
    return [slot for slot in loop.trial.graft.all_slots if slot.delta.needs_selection]


def weight_of(loop: Loop, slot) -> torch.Tensor:
    loop.trial.output()
    return loop.trial.graft.placement_of(slot).site.weight.clone()


def base_weights() -> dict[str, torch.Tensor]:
    model, _ = TEXT.build()
    return {site.name: site.weight.clone() for site in fg.sites(model) if site.kind == "layer"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_interrupted_and_resumed_they_give_the_same_bits(tmp_path, method, accumulation):
    density = {} if method == "sara" else {"density": 0.1}
    recipe = resolve(method, **density, lr=0.01)
    if method == "sara":
        control = [{"kind": "nuclear-norm", "larger_than": 1}, *recipe.data()["control"][:1]]
        recipe = Recipe.parse({**recipe.data(), "control": control}).override(threshold=0.1)
    settings: dict[str, Any] = {"made_by": recipe, "epochs": 3.0 * accumulation, "gradient_accumulation": accumulation}
    whole = trainer_in(tmp_path / "whole", **settings)
    whole.train()
    for step in (2, 8, 10):
        resumed = trainer_in(tmp_path / "parts", **settings)
        resumed.train(interrupted_after(step, tmp_path / "parts", **settings))
        assert_same(whole, resumed)


class TestLift:
    def test_just_the_chosen_move_and_the_change_is_their_union(self):
        loop = loop_of("lift", density=0.1, lr=0.05)
        base, union = base_weights(), {slot.site: set(slot.index.tolist()) for slot in slots_of(loop)}
        counts = {slot.site: len(slot.index) for slot in slots_of(loop)}
        for step in range(1, 13):
            before = {slot.site: (slot.index.clone(), weight_of(loop, slot)) for slot in slots_of(loop)}
            loop.run(step)
            for slot in slots_of(loop):
                index, weight = before[slot.site]
                changed = (weight_of(loop, slot) != weight).reshape(-1).nonzero().flatten()
                assert set(changed.tolist()) <= set(index.tolist())
                assert len(slot.index) == counts[slot.site]
                union[slot.site] |= set(slot.index.tolist())
        for slot in slots_of(loop):
            changed = (weight_of(loop, slot) != base[slot.site]).reshape(-1).nonzero().flatten()
            assert set(changed.tolist()) <= union[slot.site]
            assert set(slot.index.tolist()) | set(slot.settled_index.tolist()) == union[slot.site]
        assert any(len(slot.settled_index) for slot in slots_of(loop))

    def test_moments_of_kept_entries_are_equal_to_the_bit_across_a_refresh(self):
        loop = loop_of(resolve("lift", density=0.1, lr=0.05, times=1, filter_rank=2), steps=12)
        (refresh,) = loop.trial.graft.recipe.control[0].steps(12)
        loop.run(refresh - 1)
        states: dict[str, Any] = {}
        update = loop.control.after_step

        def noting() -> None:
            for slot in slots_of(loop):
                states[slot.site] = (
                    slot.index.clone(),
                    {name: loop.optimizer.state[slot.values][name].clone() for name in ("exp_avg", "exp_avg_sq")},
                )
            update()

        loop.control.after_step = noting
        loop.run(refresh)
        moved = 0
        for slot in slots_of(loop):
            index, state = states[slot.site]
            stayed, kept = torch.isin(slot.index, index), torch.isin(index, slot.index)
            moved += int((~stayed).sum())
            for name, before in state.items():
                assert torch.equal(loop.optimizer.state[slot.values][name][stayed], before[kept])
                assert not loop.optimizer.state[slot.values][name][~stayed].any()
        assert moved

    def test_it_chooses_by_the_weights_as_they_are_now(self):
        recipe = resolve("lift", count=4, times=1, filter_rank=1000)
        loop = loop_of(Recipe.parse({**recipe.data(), "name": "own"}))
        (refresh,) = recipe.control[0].steps(12)
        loop.run(refresh - 1)
        slot = slots_of(loop)[0]
        loop.trial.graft.put(
            slot,
            {
                "values": torch.full((1,), 100.0),
                "index": torch.tensor([0]),
                "settled_index": slot.settled_index,
                "settled_values": slot.settled_values,
            },
        )
        loop.optimizer.state.pop(slot.values, None)
        loop.run(refresh)
        assert 0 in slot.index.tolist()
        now = weight_of(loop, slot).abs().reshape(-1)
        assert set(now.topk(4).indices.tolist()) == set(slot.index.tolist())


class TestSara:
    def loop(self):
        recipe = resolve("sara", threshold=0.05, lr=0.02)
        return loop_of(recipe)

    def test_it_starts_as_the_base_with_its_signs(self):
        loop, base = self.loop(), base_weights()
        assert all(torch.equal(weight_of(loop, slot), base[slot.site]) for slot in slots_of(loop))

    def test_no_entry_beyond_the_threshold_changes_and_ever_fewer_train(self):
        loop, base = self.loop(), base_weights()
        first = {slot.site: slot.index.clone() for slot in slots_of(loop)}
        for slot in slots_of(loop):
            assert torch.equal(first[slot.site], (base[slot.site].abs() < 0.05).reshape(-1).nonzero().flatten())
        loop.run(6)
        grown = 0
        for slot in slots_of(loop):
            now = weight_of(loop, slot).abs().reshape(-1)
            assert torch.isin(slot.index, first[slot.site]).all()
            if slot.values.requires_grad:
                assert torch.equal(slot.index, first[slot.site][now[first[slot.site]] < 0.05])
                assert slot.values not in loop.optimizer.state  # made afresh
            grown += len(slot.settled_index)
        assert grown
        settled = {slot.site: (slot.settled_index, weight_of(loop, slot)) for slot in slots_of(loop)}
        loop.run()
        for slot in slots_of(loop):
            index, weight = settled[slot.site]
            now = weight_of(loop, slot)
            assert torch.equal(now.reshape(-1)[index], weight.reshape(-1)[index])
            changed = (now != base[slot.site]) & (base[slot.site].abs() >= 0.05)
            assert not changed.any()

    def test_when_nothing_passes_any_more_the_last_ones_go_on_and_it_says_so(self):
        recipe = resolve("sara", threshold=2e-3, lr=0.1).model_copy(update={"heads": "none"})
        loop = loop_of(recipe)
        with pytest.warns(RuntimeWarning, match="nothing would be left to train"):
            loop.run()


class TestGrowAndPrune:
    @pytest.mark.parametrize("method", ["sft-ag", "sft-ma"])
    def test_as_many_entries_as_at_first_train_and_no_other_differs(self, method):
        loop, base = loop_of(method, density=0.1, lr=0.02, every=3, collect=2), base_weights()
        counts = {slot.site: len(slot.index) for slot in slots_of(loop)}
        seen = []
        for step in range(1, 13):
            loop.run(step)
            for slot in slots_of(loop):
                assert len(slot.index) == len(slot.index.unique()) == counts[slot.site]
                assert not len(slot.settled_index)
                changed = (weight_of(loop, slot) != base[slot.site]).reshape(-1).nonzero().flatten()
                assert torch.isin(changed, slot.index).all()
            seen.append(torch.cat([slot.index for slot in slots_of(loop)]).tolist())
        assert [i + 1 for i in range(1, 12) if seen[i] != seen[i - 1]] == [2, 5, 8, 11]
        output = loop.trial.output()
        loop.trial.graft.merge()
        loop.trial.graft.unmerge()
        assert torch.equal(loop.trial.output(), output)

    def test_replacing_nothing_is_static_training_to_the_bit(self):
        recipe = resolve("sft-ag", density=0.1, lr=0.02, first=0.0, share=0.0, every=3, collect=2)
        moving, static = loop_of(recipe), loop_of(recipe.model_copy(update={"control": ()}))
        from_control = moving.run()
        static.optimizer = type(moving.optimizer)(static.trial.graft.parameter_groups(lr=0.02))
        assert from_control == static.run()
        for one, other in zip(slots_of(moving), slots_of(static), strict=True):
            assert torch.equal(one.values, other.values)

    def test_it_grows_where_the_summed_gradient_is_largest_with_the_moments_it_would_have(self):
        loop = loop_of("sft-ag", density=0.1, lr=0.0001, every=50, collect=2)
        model, batch = TEXT.build()
        model(**batch)["loss"].backward()
        gradients = {site.name: site.module.weight.grad for site in fg.sites(model) if site.type == "linear"}
        loop.run(2)
        for slot in slots_of(loop):
            exact = gradients[slot.site].reshape(-1)
            wanted = exact.abs().topk(len(slot.index)).indices
            assert set(wanted.tolist()) == set(slot.index.tolist())
            state = loop.optimizer.state[slot.values]
            assert torch.equal(state["age"], torch.full_like(state["age"], 2.0))
            new = slot.values == 0
            expected = exact[slot.index] * (1 - 0.9**2)
            assert torch.allclose(state["exp_avg"][new], expected[new], rtol=0.02, atol=1e-6)
            expected = exact[slot.index].square() * (1 - 0.999**2)
            assert torch.allclose(state["exp_avg_sq"][new], expected[new], rtol=0.05, atol=1e-9)

    def test_momenta_grow_where_rows_and_columns_moved_most(self):
        loop = loop_of("sft-ma", density=0.1, lr=0.001, every=50, collect=3)
        start = {slot.site: slot.index.clone() for slot in slots_of(loop)}
        loop.run(3)
        for slot in slots_of(loop):
            state = loop.optimizer.state[slot.values]
            assert (state["row"].shape, state["column"].shape) == ((wide(loop, slot)[0], 1), (1, wide(loop, slot)[1]))
            wanted = (state["row"] * state["column"]).reshape(-1)
            least = wanted[slot.index].min()
            assert int((wanted > least).sum()) <= len(slot.index)
            assert len(slot.index) == len(start[slot.site])

    def test_momenta_need_their_optimizer(self):
        loop = loop_of("sft-ma", density=0.1, every=50, collect=1)
        loop.optimizer = torch.optim.AdamW(loop.trial.graft.parameters())
        loop.control._runs[0][1].optimizer = loop.optimizer
        with pytest.raises(RecipeError, match="what the optimizer sm3 keeps"):
            loop.run()

    def test_only_entries_grow(self):
        data = resolve("sft-ag").data()
        data["parts"][0]["what"] = [{"kind": "sparse", "unit": "row"}]
        data["parts"][0]["select"]["unit"] = "row"
        with pytest.raises(RecipeError, match="moves entries; 'sft-ag' selects by row"):
            loop_of(Recipe.parse(data)).run()

    def test_phases_that_overlap_are_refused(self):
        with pytest.raises(ValueError, match="collects for 5 steps, but the next begins after 3"):
            GrowAndPrune(every=3)
        with pytest.raises(ValueError, match="give either every or times"):
            GrowAndPrune()

    def test_later_phases_replace_less(self):
        control = GrowAndPrune(every=10)
        assert control.begins(40) == [0, 10, 20, 30]
        assert [control._rate(b, 40) for b in (0, 10, 20)] == pytest.approx([1.0, 0.15, 0.1])
        cosine = GrowAndPrune(times=2, decay="cosine")
        assert cosine.begins(40) == [0, 20]
        assert cosine._rate(20, 40) == pytest.approx(0.1)


def wide(loop: Loop, slot) -> tuple[int, ...]:
    return loop.trial.graft.placement_of(slot).site.matrix_shape


class TestLottery:
    def loop(self, **settings):
        return loop_of(resolve("lt-sft", density=0.05, lr=0.02, **settings))

    def test_the_entries_that_changed_most_train_alone_from_the_start(self):
        loop, base = self.loop(), base_weights()
        head = {n: t.clone() for n, t in loop.trial.graft.state().items() if "classifier" in n}
        loop.run(5)
        assert all(len(slot.index) == slot.values.numel() == base[slot.site].numel() for slot in slots_of(loop))
        update, changes = loop.control.after_step, {}

        def noting() -> None:
            changes.update({slot.site: slot.values.detach().abs().clone() for slot in slots_of(loop)})
            update()

        loop.control.after_step = noting
        loop.run(6)
        together = torch.cat(list(changes.values()))
        wanted = sum(max(1, round(0.05 * len(change))) for change in changes.values())
        least = together.topk(wanted).values.min()
        assert sum(len(slot.index) for slot in slots_of(loop) if slot.values.requires_grad) == wanted
        for slot in slots_of(loop):
            assert torch.equal(weight_of(loop, slot), base[slot.site])
            assert not slot.values.requires_grad or (changes[slot.site][slot.index] >= least).all()
        assert all(torch.equal(loop.trial.graft.state()[n], t) for n, t in head.items())
        assert not loop.optimizer.state
        loop.run()
        changed = sum(int((weight_of(loop, slot) != base[slot.site]).sum()) for slot in slots_of(loop))
        assert 0 < changed <= wanted

    def test_rounds_add_parts_of_the_budget(self):
        loop = self.loop(rounds=2)
        loop.run(3)
        first = {k: t.clone() for k, t in loop.control._runs[0][1].memory.items() if k.startswith("ticket/")}
        loop.run(6)
        total = sum(max(1, round(0.05 * base_weights()[slot.site].numel())) for slot in slots_of(loop))
        assert sum(map(len, first.values())) == total // 2
        assert sum(len(slot.index) for slot in slots_of(loop) if slot.values.requires_grad) == total
        for key, ticket in first.items():
            assert torch.isin(ticket, loop.control._runs[0][1].memory[key]).all()

    def test_sites_may_keep_their_own_budgets(self):
        loop = self.loop(together=False)
        counts = {slot.site: len(slot.index) for slot in slots_of(loop)}
        loop.run()
        assert {slot.site: len(slot.index) for slot in slots_of(loop)} == counts

    def test_the_dense_phase_has_a_rate_of_its_own(self):
        loop = self.loop(dense_rate=0.25)
        (group,) = (group for group in loop.optimizer.param_groups if group["name"] == "change")
        rates, step = [], loop.optimizer.step

        def noting(*args, **kwargs):
            rates.append(group["lr"])
            return step(*args, **kwargs)

        loop.optimizer.step = noting
        loop.run()
        half = len(rates) // 2
        assert rates == [0.005] * half + [0.02] * (len(rates) - half)
        assert "full_lr" not in group

    def test_grafts_of_it_compose_by_addition(self):
        model, _ = TEXT.build()
        base = {n: p.detach().clone() for n, p in model.named_parameters()}
        both = [fg.graft(model, "lt-sft", density=0.05, seed=seed, heads="none") for seed in (0, 1)]
        for number, graft in enumerate(both):
            Case(TEXT, graft.recipe).disturb(graft, seed=number)
        model(**TEXT.build()[1])
        together = {n: p.detach().clone() for n, p in model.named_parameters() if n in base}
        both[0].detach()
        model(**TEXT.build()[1])
        alone = {n: p.detach().clone() for n, p in model.named_parameters() if n in base}
        other_model, _ = TEXT.build()
        swapped = [fg.graft(other_model, "lt-sft", density=0.05, seed=seed, heads="none") for seed in (1, 0)]
        for number, graft in zip((1, 0), swapped, strict=True):
            Case(TEXT, graft.recipe).disturb(graft, seed=number)
        other_model(**TEXT.build()[1])
        for name, parameter in other_model.named_parameters():
            if name in base:
                assert torch.allclose(parameter, together[name], atol=1e-6)
        assert any(not torch.equal(together[n], alone[n]) for n in base)


class Whenever(Recurring):
    kind = "whenever"


def test_moments_to_act_at():
    assert Whenever(every=4).steps(12) == [4, 8]
    assert Whenever(every=4, until=0.5).steps(12) == [4]
    assert Whenever(times=3).steps(40) == [10, 20, 29]
    assert Whenever(at=(0.25, 0.5)).steps(40) == [10, 20]
    assert Whenever(times=50).steps(4) == [1, 2, 3]
    assert Whenever(every=1).steps(1) == []
    with pytest.raises(ValueError, match="exactly one of every, times and at; found every and times"):
        Whenever(every=1, times=2)


def test_scores_of_gradients_choose_again_by_the_last_batches():
    recipe = resolve("gradient-sparse", density=0.1, lr=0.001)
    recipe = Recipe.parse({**recipe.data(), "control": [{"kind": "reselect", "every": 4, "look": 2}]})
    loop = loop_of(recipe)
    loop.run(3)
    memory = loop.control._runs[0][1].memory
    assert {key.split("/")[1] for key in memory} == {"0"}
    loop.run(4)
    assert not [key for key in memory if key.startswith("batch")]
    assert any(len(slot.settled_index) for slot in slots_of(loop))


def test_budgets_can_shrink_on_the_way():
    recipe = resolve("lift", density=0.4)
    control = [{"kind": "reselect", "every": 3, "to": 0.1, "dropped": "revert"}]
    loop = loop_of(Recipe.parse({**recipe.data(), "control": control}))
    counts = []
    for step in (3, 6, 9):
        loop.run(step)
        counts.append(sum(len(slot.index) for slot in slots_of(loop)))
    size = sum(base_weights()[slot.site].numel() for slot in slots_of(loop))
    assert [round(count / size, 1) for count in counts] == [0.3, 0.2, 0.1]


def test_scoring_while_training_leaves_no_dense_gradient():
    loop = loop_of("sft-ag", density=0.1, every=3, collect=2)
    loop.run(1)
    gc.collect()
    shapes = {wide(loop, slot) for slot in slots_of(loop)}
    own = {id(p) for p in loop.trial.model.parameters()}
    left = [t for t in gc.get_objects() if type(t) is torch.Tensor and tuple(t.shape) in shapes and id(t) not in own]
    assert not left
    assert all(p.grad is None for p in loop.trial.model.parameters())


def test_reselect_has_something_to_move_or_says_so():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    parts = [{"where": {"name": "0"}, "what": {"kind": "low-rank", "rank": 2}}]
    made = fg.graft(model, {"parts": parts, "control": [{"kind": "reselect", "every": 1}]})
    control = fg.Control(made, torch.optim.AdamW(made.parameter_groups()), total_steps=3)
    with pytest.raises(RecipeError, match="no change has any"):
        control.before_step()
