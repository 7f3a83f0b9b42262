"""Methods with budgets of ranks and penalties, in training: what their papers' sheets say can be checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import finegraft as fg
from finegraft.control.freeze_by_score import FreezeByScore
from finegraft.control.group_lasso import GroupLasso
from finegraft.control.orthonormality import gap_to_orthonormal
from finegraft.control.output_penalty import OutputPenalty, consistency, entropy, leading_share, redundancy
from finegraft.control.overlap import overlap
from finegraft.control.row_rates import row_factors
from finegraft.errors import RecipeError
from finegraft.grafting.make import resolve
from finegraft.grafting.ranks import truncated
from finegraft.recipe import Recipe
from finegraft.registry import methods
from tests.control.sampled import Training, deep_model
from tests.train.test_trainer import assert_same, interrupted_after, trainer_in


def training(method: str, *, total: int = 10, **settings: Any) -> Training:
    return Training(method, total=total, blocks=2, lr=0.02, **settings)


def ranks(made: Training) -> list[int]:
    return [slot.delta.rank for slot in made.graft.all_slots]


def run(made: Training, steps: int) -> None:
    for _ in range(steps):
        made.step()


class TestAdaLora:
    def test_the_file_holds_the_survivors_only(self, tmp_path):
        made = training("adalora", rank=3, every=2, keep=0.5)
        run(made, 10)
        made.control.finish()
        assert sum(ranks(made)) == round(0.5 * 3 * len(ranks(made)))
        assert len(set(ranks(made))) > 1
        sites = [placement.site for placement in made.graft.placements]
        expected = sum(r * (s.fan_in + s.fan_out + 1) for r, s in zip(ranks(made), sites, strict=True))
        assert made.graft.num_trainable == expected
        path = made.graft.save(tmp_path / "graft")
        assert (path / "graft.safetensors").stat().st_size < 4 * expected + 1024 * (1 + 3 * len(sites))
        model, batch = deep_model(2)
        loaded = fg.load(path, model, trainable=True)
        assert loaded.num_trainable == expected
        made.model.eval()
        torch.testing.assert_close(model.eval()(**batch).logits, made.model(**batch).logits)

    def test_a_site_may_lose_all_its_ranks(self, tmp_path):
        made = training("adalora", rank=2, every=2, keep=0.1)
        run(made, 10)
        assert 0 in ranks(made)
        path = made.graft.save(tmp_path / "graft")
        model, batch = deep_model(2)
        assert len(fg.load(path, model).placements) == sum(rank > 0 for rank in ranks(made))
        torch.testing.assert_close(model.eval()(**batch).logits, made.model.eval()(**batch).logits)

    def test_masked_ranks_may_come_back_and_everything_trains_meanwhile(self):
        made = training("adalora", rank=3, every=1, keep=0.3, warmup=0.0, final=0.1)
        run(made, 4)
        masked = [slot.m == 0 for slot in made.graft.all_slots]
        assert any(bool(mask.any()) for mask in masked)
        run(made, 1)
        for slot, mask in zip(made.graft.all_slots, masked, strict=True):
            assert not mask.any() or bool(slot.m.grad[mask].any())

    def test_it_needs_ranks_that_can_be_dropped(self):
        recipe = Recipe.parse({"parts": [{"where": {"role": "q"}, "what": "bias"}], "control": ["rank-budget"]})
        with pytest.raises(RecipeError, match="has none whose ranks can be dropped"):
            training(recipe.override(lr=0.01)).step()  # type: ignore[arg-type]


class TestGrowth:
    @pytest.mark.parametrize("method", ["increlora", "triadaptlora"])
    def test_ranks_grow_to_what_was_planned_and_no_further(self, method):
        made = training(method, rank=2, ranks=1, times=4, until=0.9)
        totals = []
        for _ in range(10):
            made.step()
            totals.append(sum(made.control.memory("rank-growth")["active"].values()))
        made.control.finish()
        assert totals == sorted(totals)
        assert totals[-1] == sum(ranks(made)) == 2 * 2 * len(ranks(made))
        assert totals[0] == 2 * len(ranks(made))
        assert all(slot.delta.alpha == 16.0 for slot in made.graft.all_slots)
        sites = [placement.site for placement in made.graft.placements]
        middle = (lambda r: r) if method == "increlora" else (lambda r: r * r)
        counts = [r * (s.fan_in + s.fan_out) + middle(r) for r, s in zip(ranks(made), sites, strict=True)]
        assert made.graft.num_trainable == sum(counts)

    def test_reserved_ranks_learn_with_a_fixed_weight(self):
        made = training("increlora", rank=1, ranks=2, times=1, until=1.0)
        made.step()
        before = [slot.a.detach().clone() for slot in made.graft.all_slots]
        run(made, 2)
        for slot, a in zip(made.graft.all_slots, before, strict=True):
            assert slot.delta.rank == 3
            assert slot.delta.alpha == pytest.approx(3 * 16.0)  # one rank acts at 16 / 1
            assert torch.equal(slot.m[1:], torch.full((2,), 1e-5))
            assert not torch.equal(slot.a[1:], a[1:])

    def test_the_score_is_zero_while_the_change_is(self):
        made = training("increlora", rank=1, look=1, reserve=0.0)
        made.step()
        memory = made.control.memory("rank-growth")
        assert all(float(value) == 0 for key, value in memory.items() if key.startswith("mean/"))
        run(made, 1)
        assert any(float(value) > 0 for key, value in memory.items() if key.startswith("mean/"))

    def test_pace(self):
        made = training("triadaptlora", rank=1, ranks=1, times=9, until=1.0, total=20)
        rounds = made.graft.recipe.control[0].steps(20)
        grown = []
        for step in range(1, 20):
            before = sum(ranks(made))
            made.step()
            if step in rounds:
                left = 2 * len(ranks(made)) - before
                expected = max(1, int(left * (step - rounds[0]) / (rounds[-1] - rounds[0])))
                grown.append((sum(ranks(made)) - before, min(expected, left)))
        assert all(found == expected for found, expected in grown)


class TestDyLora:
    def test_a_step_at_rank_b_is_one_of_plain_lora_of_that_rank(self):
        made = training("dylora", rank=4, last_only=False, total=4)
        other = training("lora", rank=2, total=4)
        with torch.no_grad():
            for slot, small in zip(made.graft.all_slots, other.graft.all_slots, strict=True):
                slot.b.normal_()
                small.a.copy_(slot.a[:2])
                small.b.copy_(slot.b[:, :2])
                slot.leading = 2
        losses = [one.model(**one.batch).loss for one in (made, other)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        for slot, small in zip(made.graft.all_slots, other.graft.all_slots, strict=True):
            torch.testing.assert_close(slot.a.grad[:2], small.a.grad)
            assert not slot.a.grad[2:].any()
            torch.testing.assert_close(slot.b.grad[:, :2], small.b.grad)

    def test_only_the_last_rank_that_acts_learns(self):
        made = training("dylora", rank=4)
        with torch.no_grad():
            for slot in made.graft.all_slots:
                slot.b.normal_()
        drawn = set()
        for _ in range(6):
            made.optimizer.zero_grad()
            made.control.before_step()
            made.model(**made.batch).loss.backward()
            slot = made.graft.all_slots[0]
            learns = slot.a.grad.any(1).nonzero().flatten().tolist()
            assert learns == [slot.leading - 1] == slot.b.grad.any(0).nonzero().flatten().tolist()
            drawn.add(slot.leading)
            made.control.after_step()
            assert slot.leading is None
        assert len(drawn) > 1

    def test_in_evaluation_all_ranks_act_and_any_number_can_be_saved(self, tmp_path):
        made = training("dylora", rank=3)
        run(made, 8)
        whole = made.model.eval()(**made.batch).loss
        made.control.before_step()
        torch.testing.assert_close(made.model(**made.batch).loss, whole)
        made.control.finish()
        for rank in (1, 2, 3):
            with truncated(made.graft, rank):
                path = made.graft.save(tmp_path / str(rank))
                expected = made.model(**made.batch).loss
            model, batch = deep_model(2)
            assert {slot.delta.rank for slot in fg.load(path, model).all_slots} == {rank}
            torch.testing.assert_close(model.eval()(**batch).loss, expected)


class TestAfLora:
    def test_factors_freeze_for_good_and_all_of_them_in_the_end(self):
        made = training("aflora", total=20, warmup=0.1, final=0.3, window=2)
        frozen: set[str] = set()
        for step in range(1, 21):
            made.step()
            now = {name for name, p in made.graft.named_parameters() if not p.requires_grad}
            assert frozen <= now
            assert step > 2 or not now
            frozen = now
            if step == 8:
                assert 0 < len(now) < 2 * len(made.graft.all_slots)
        factors = {name for name, _ in made.graft.named_parameters() if name[-1] in "ab"}
        assert frozen == factors
        assert not any(p in made.optimizer.state for name, p in made.graft.named_parameters() if name in frozen)

    def test_the_share_rises_to_all(self):
        control = FreezeByScore(warmup=0.1, final=0.5)
        assert [control.frozen_share(step, 100) for step in (0, 10, 50, 90)] == [0.0, 0.0, 1.0, 1.0]
        assert control.frozen_share(30, 100) == pytest.approx(1 - 0.5**3)


class TestPenalties:
    def test_sorsa_starts_orthonormal(self):
        made = training("sorsa", rank=2)
        assert float(made.control.penalty().detach()) < 1e-3 * 4e-4 / 0.02
        run(made, 2)
        assert float(made.control.penalty().detach()) > 1e-3 * 4e-4 / 0.02

    def test_hra_takes_it_too(self):
        control = [{"kind": "orthonormality", "strength": 1e-4, "over": "sum"}]
        recipe = Recipe.parse({**methods["hra"].data(), "control": control})
        made = training(recipe, reflections=2)  # type: ignore[arg-type]
        pairs = len(made.graft.all_slots)
        assert float(made.control.penalty().detach()) == pytest.approx(1e-4 * pairs * 2**0.5)  # two equal unit vectors

    def test_nothing_to_pay_for_orthonormal_rows(self):
        frame = torch.linalg.qr(torch.randn(6, 3)).Q.T
        assert float(gap_to_orthonormal(frame)) < 1e-6
        assert float(gap_to_orthonormal(2 * frame)) == pytest.approx(3 * 3**0.5, rel=1e-5)

    def test_changes_pay_for_what_they_read_in_common(self):
        rows = torch.linalg.qr(torch.randn(8, 8)).Q
        weight, b = torch.randn(5, 4) @ rows[:4], torch.randn(5, 2)
        one, two = (rows[4:6], b), (rows[6:8], b)
        assert float(overlap(weight, [one, two])) < 1e-4
        dense = [b @ rows[4:6], b @ rows[3:5]]
        expected = sum((weight @ d.T).abs().sum() for d in dense) + (dense[0] @ dense[1].T).abs().sum()
        torch.testing.assert_close(overlap(weight, [one, (rows[3:5], b)]), expected)

    def test_pego_starts_at_zero(self):
        made = training("pego", rank=1)
        assert float(made.control.penalty().detach()) == 0.0
        assert len(made.graft.all_slots) == 4 * len(made.graft.placements)

    def test_outputs_of_ba_lora(self):
        logits = torch.randn(6, 3)
        assert float(consistency(logits, logits)) == 0.0
        white = torch.linalg.qr(torch.randn(6, 4) - 0.0).Q
        centred = torch.linalg.qr(torch.cat([torch.ones(6, 1), white], 1)).Q[:, 1:4]
        assert float(redundancy(centred)) < 1e-10
        assert float(leading_share(torch.randn(6, 2) @ torch.randn(2, 5), 3)) == pytest.approx(1.0)
        assert float(entropy(torch.zeros(2, 3, 4))) == pytest.approx(torch.tensor(4.0).log().item())

    def test_ba_lora_adds_the_gradient_of_its_penalty(self):
        made = training("ba-lora", rank=2, dropout=0.0)
        made.control.before_step()
        with torch.no_grad():
            for parameter in made.graft.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        made.model(**made.batch).loss.backward()
        before = {name: p.grad.clone() for name, p in made.graft.named_parameters()}
        for _ in range(2):
            made.control.after_backward(made.batch)
        made.control.before_update()
        with torch.no_grad(), made.graft.disabled():
            base = made.model.eval()(**made.batch).logits
        own = dict(made.graft.named_parameters())
        loss = OutputPenalty().loss(made.model.train()(**made.batch).logits, base)
        for (name, p), grad in zip(own.items(), torch.autograd.grad(loss, list(own.values())), strict=True):
            torch.testing.assert_close(p.grad, before[name] + grad)


class TestGroupLasso:
    def test_shrinking_reaches_exactly_zero_and_zero_groups_are_in_no_file(self, tmp_path):
        control = [{"kind": "group-lasso", "by": "shrink", "strength": 300.0, "warmup": 0.0, "drop_below": 0.0}]
        recipe = Recipe.parse({**methods["gs-lora"].data(), "control": control}).override(rank=1, lr=1e-3)
        made = Training(recipe, total=4, blocks=2)
        with torch.no_grad():
            for name, parameter in made.graft.named_parameters():
                parameter.fill_(0.01 if ".0." in name else 1.0)
        made.step()
        made.control.finish()
        sites = {slot.site: slot.delta.rank for slot in made.graft.all_slots}
        assert {rank for site, rank in sites.items() if ".0." in site} == {0}
        assert {rank for site, rank in sites.items() if ".1." in site} == {1}
        assert len(fg.load(made.graft.save(tmp_path / "graft"), deep_model(2)[0]).placements) == len(sites) // 2

    def test_a_group_is_shortened_by_strength_times_rate(self):
        control = [{"kind": "group-lasso", "by": "shrink", "strength": 2.0, "warmup": 0.0}]
        made = Training(Recipe.parse({**methods["gs-lora"].data(), "control": control}), total=4, blocks=2, lr=0.1)
        lasso, state = made.graft.recipe.control[0], made.control._runs[0][1]
        state.step = 1
        norms = [float(sum(t.square().sum() for t in group).detach()) ** 0.5 for group in lasso._groups(state).values()]
        lasso.after_step(state)
        after = [float(sum(t.square().sum() for t in group).detach()) ** 0.5 for group in lasso._groups(state).values()]
        assert after == pytest.approx([norm - 0.2 for norm in norms], rel=1e-4)

    def test_it_rises_after_the_warmup(self):
        lasso = GroupLasso(strength=1.0, warmup=0.5, rise=0.2)
        found = [lasso.strength_at(step, 10) for step in range(10)]
        assert found == pytest.approx([0, 0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1])

    def test_the_penalty_is_the_sum_of_norms(self):
        made = training("gs-lora", rank=1, warmup=0.0)
        lasso, state = made.graft.recipe.control[0], made.control._runs[0][1]
        blocks = [torch.cat([p.detach().flatten() for p in group]) for group in lasso._groups(state).values()]
        assert len(blocks) == 2
        torch.testing.assert_close(made.control.penalty().detach(), 1e-4 * sum(block.norm() for block in blocks))


class TestAllora:
    def test_rows_of_zeros_step_at_the_largest_rate(self):
        made, plain = (training(m, rank=2, alpha=2.0, total=100) for m in ("allora", "lora"))
        before = [slot.a.detach().clone() for slot in made.graft.all_slots]
        for one in (made, plain):
            for group in one.optimizer.param_groups:
                group["weight_decay"] = 0.0
            one.step()
        for mine, theirs, a in zip(made.graft.all_slots, plain.graft.all_slots, before, strict=True):
            torch.testing.assert_close(mine.b, 2 * theirs.b)
            torch.testing.assert_close(mine.a - a, row_factors(a, 2.0) * (theirs.a - a))

    def test_factors_fall_with_the_norm(self):
        rows = torch.diag(torch.tensor([0.0, 1.0, 3.0]))
        assert row_factors(rows, 1.0).flatten().tolist() == pytest.approx([1.0, 0.5**0.5, 0.5])


def test_a_budget_interrupted_and_resumed_gives_the_same_bits(tmp_path):
    recipe = resolve("adalora", lr=0.01, every=2, rank=3)
    whole = trainer_in(tmp_path / "whole", made_by=recipe)
    whole.train()
    resumed = trainer_in(tmp_path / "parts", made_by=recipe)
    resumed.train(interrupted_after(7, tmp_path / "parts", made_by=recipe))
    assert_same(whole, resumed)
    again = trainer_in(tmp_path / "parts", made_by=recipe)
    again.train(tmp_path / "parts" / f"checkpoint-{whole.state.max_steps}")
    assert_same(whole, again)
