"""Hyper-networks: what they count, what tells tasks and places apart, and ordinary grafts made of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import finegraft as fg
from finegraft.control.prototypes import among_samples
from finegraft.deltas.generated import RETRIEVER, invariant
from finegraft.errors import FinegraftError, RecipeError, SiteError
from finegraft.grafting.make import resolve
from finegraft.testing.base_models import VOCABULARY, Classifier
from finegraft.testing.case import close, identical

DEPTH, WIDTH, RANK, EMBEDDING, HIDDEN, CODE = 2, 16, 2, 4, 8, 8
SMALL = {"embedding": EMBEDDING, "hidden": HIDDEN, "code": CODE}
IDS = torch.randint(0, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(0))
ADAPTER = 2 * WIDTH * RANK + RANK + WIDTH


def network(into: int) -> int:
    return into * HIDDEN + HIDDEN + HIDDEN * CODE + CODE + 2 * CODE


def grafted(what=None, *, of=None, role=("attn", "ffn"), **settings):
    """A small transformer, and a hyper-network on its sublayers with noise on all that trains."""
    torch.manual_seed(0)
    model = Classifier(WIDTH, 24, 4, depth=DEPTH, classes=3).eval()
    what = what or {"kind": "hyper", "of": of or {"kind": "bottleneck", "width": RANK}, **SMALL, **settings}
    graft = fg.graft(model, {"parts": [{"where": {"role": list(role)}, "what": what}], "heads": "none"})
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model, graft


def output(model):
    with torch.no_grad():
        return model(IDS)["logits"]


def count(method, **settings):
    model = Classifier(WIDTH, 24, 4, depth=DEPTH, classes=3)
    recipe = resolve(method, heads="none", **settings)
    recipe = recipe.model_copy(update={"parts": recipe.parts[:1]})
    return fg.graft(model, recipe).num_trainable


class TestCounts:
    def test_hyperformer_has_heads_for_each_position(self):
        found = count("hyperformer", tasks=3, width=RANK, **SMALL)
        heads = 2 * (CODE + 1) * (ADAPTER + 2 * WIDTH)
        assert found == (3 + DEPTH) * EMBEDDING + network(2 * EMBEDDING) + heads

    def test_hyperformer_plus_plus_has_one_set_of_heads_whatever_the_depth(self):
        found = count("hyperformer++", tasks=3, width=RANK, **SMALL)
        heads = (CODE + 1) * (ADAPTER + 2 * WIDTH)
        assert found == (3 + DEPTH + 2) * EMBEDDING + network(3 * EMBEDDING) + heads

    def test_hyper_adapter_has_a_table_for_each_side(self):
        found = count("hyper-adapter", tasks=3, width=RANK, **SMALL)
        into = CODE * 3 * EMBEDDING + CODE + network(CODE)
        assert found == (2 * 3 + DEPTH) * EMBEDDING + into + (CODE + 1) * (ADAPTER + 2 * WIDTH)

    def test_polyhistor_decomposes_heads(self):
        found = count("polyhistor", tasks=3, width=RANK, head_rank=3, **SMALL)
        heads = 4 * 3 * CODE + (3 + 1) * ADAPTER
        assert found == (3 + 2) * EMBEDDING + DEPTH * (network(2 * EMBEDDING) + heads)

    def test_polyhistor_lite_adds_only_kernels_with_depth(self):
        found = count("polyhistor-lite", tasks=3, width=RANK, head_rank=3, template=4, **SMALL)
        templates = 2 * 4 * RANK + RANK + 4
        kernels = WIDTH // 4 + WIDTH // 4 + 1 + WIDTH // 4
        heads = 4 * 3 * CODE + (3 + 1) * templates
        assert found == 3 * EMBEDDING + network(EMBEDDING) + heads + 2 * DEPTH * kernels

    def test_invariance_doubles_the_input_and_adds_the_kinds_own_tensors(self):
        found = count("mip", width=RANK, **SMALL)
        generated = network(2 * 3 * EMBEDDING) - 2 * CODE + (CODE + 1) * ADAPTER
        assert found == (1 + DEPTH + 1) * EMBEDDING + generated + DEPTH * ADAPTER

    def test_a_task_more_is_an_embedding_more(self):
        for method in ("hyperformer", "hyperformer++", "polyhistor", "polyhistor-lite", "mip"):
            assert count(method, tasks=5, **SMALL) - count(method, tasks=4, **SMALL) == EMBEDDING


class TestTasks:
    def test_equal_embeddings_give_equal_outputs_and_others_others(self):
        model, graft = grafted(tasks=["a", "b"])
        first = output(model)
        graft.task = "b"
        assert not torch.equal(output(model), first)
        with torch.no_grad():
            graft.all_slots[0].task_embedding[1] = graft.all_slots[0].task_embedding[0]
        identical(output(model), first)

    def test_samples_of_several_tasks_are_told_apart(self):
        for of in ({"kind": "bottleneck", "width": 2}, {"kind": "scale-shift", "side": "in"}):
            model, graft = grafted(of=of, role=("ffn",) if of["kind"] == "bottleneck" else ("q", "up"), tasks=3)
            alone = []
            for task in range(3):
                graft.task = task
                alone.append(output(model))
            graft.task = torch.tensor([2, 0, 2, 1])
            close(output(model), torch.stack([alone[task][row] for row, task in enumerate([2, 0, 2, 1])]), 1e-6)

    def test_swapped_languages_swap_adapters(self):
        model, graft = grafted(conditions=["source", "target"], tasks=["de", "en"])
        graft.task = ("de", "en")
        before = output(model)
        slot = graft.all_slots[0]
        with torch.no_grad():
            for table in (slot.source_embedding, slot.target_embedding):
                table.copy_(table.flip(0))
        assert not torch.equal(output(model), before)
        graft.task = ("en", "de")
        identical(output(model), before)

    @pytest.mark.parametrize(
        ("task", "says"),
        [
            ("c", "unknown task 'c'; .*known: a, b"),
            (2, "unknown task 2"),
            (True, "unknown task True"),
            (None, "a task is one of a, b"),
            ([], "a task is one of a, b"),
            ([0, 5], "unknown task 5"),
        ],
    )
    def test_unknown_tasks_are_refused_and_change_nothing(self, task, says):
        model, graft = grafted(tasks=["a", "b"])
        graft.task = "b"
        before = output(model)
        with pytest.raises(RecipeError, match=says):
            graft.task = task
        identical(output(model), before)

    def test_a_graft_without_tasks_says_so(self):
        _, graft = grafted({"kind": "bottleneck"})
        with pytest.raises(RecipeError, match="no change of this graft differs by task"):
            graft.task = "a"

    def test_a_batch_of_another_size_is_refused(self):
        model, graft = grafted(tasks=2)
        graft.task = [0, 1]
        with pytest.raises(RecipeError, match="tasks of 2 samples; a layer was given a batch of shape"):
            output(model)

    def test_one_weight_takes_one_task(self):
        model, graft = grafted(of={"kind": "low-rank", "rank": 1}, role=("q",), tasks=2)
        graft.task = [0, 1, 0, 1]
        with pytest.raises(RecipeError, match="set one task"):
            graft.merge()
        graft.task = 1
        before = output(model)
        graft.merge()
        close(output(model), before, 1e-5)
        with pytest.raises(RecipeError, match="call unmerge"):
            graft.task = 0


class TestMaterialise:
    def test_an_ordinary_graft_gives_the_same_outputs_and_is_saved_alone(self, tmp_path):
        for of, role in (({"kind": "bottleneck", "width": 2}, "ffn"), ({"kind": "low-rank", "rank": 1}, "v")):
            model, graft = grafted(of=of, role=(role,), tasks=["a", "b"], magnitude_invariant=role == "v")
            graft.task = "b"
            live = output(model)
            graft.task = "a"
            made = fg.materialise(graft, "b")
            identical(output(model), live)
            path = made.save(tmp_path / role)
            assert made.recipe.data()["parts"][0]["what"] == [of]
            graft.detach()
            made.detach()
            loaded = fg.load(path, model)
            identical(output(model), live)
            if role == "v":
                loaded.merge()
                close(output(model), live, 1e-5)

    def test_other_changes_and_heads_come_along(self):
        torch.manual_seed(0)
        model = Classifier(WIDTH, 24, 4, depth=DEPTH, classes=3).eval()
        graft = fg.graft(model, "hyperformer++", **SMALL)
        with torch.no_grad():
            for parameter in graft.parameters():
                parameter += 0.1
        live = output(model)
        made = fg.materialise(graft)
        identical(output(model), live)
        graft.detach()
        identical(output(model), live)
        made.scale = 0.5
        assert not torch.equal(output(model), live)

    def test_an_ordinary_graft_is_refused(self):
        _, graft = grafted({"kind": "bottleneck"})
        with pytest.raises(RecipeError, match="has no hyper-network"):
            fg.materialise(graft)
        for function in (fg.materialise, fg.nearest_tasks):
            with pytest.raises(RecipeError, match="takes a graft"):
                function("lora")


class TestStarts:
    @pytest.mark.parametrize("rescale", [True, False])
    def test_generated_tensors_are_as_large_as_the_kind_starts_them_whatever_the_width(self, rescale):
        for code in (8, 128):
            model = Classifier(WIDTH, 24, 4, depth=DEPTH, classes=3)
            what = {"kind": "hyper", "of": {"kind": "bottleneck", "width": 8}, "code": code, "rescale": rescale}
            graft = fg.graft(model, {"parts": [{"where": {"role": "ffn"}, "what": what}], "heads": "none"})
            slot = graft.all_slots[0]
            down = slot.delta.made(slot).down
            assert down.std().item() == pytest.approx(1 / math.sqrt(3 * WIDTH), rel=0.3)

    def test_a_start_as_the_identity_leaves_no_factor_without_a_gradient(self):
        """A bottleneck whose two maps are both zero never trains them."""
        torch.manual_seed(0)
        model = Classifier(WIDTH, 24, 4, depth=DEPTH, classes=3).eval()
        before = output(model)
        graft = fg.graft(model, "hyper-adapter", width=RANK, heads="none", **SMALL)
        identical(output(model), before)
        optimizer = torch.optim.SGD(graft.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(IDS)["logits"].square().sum().backward()
            optimizer.step()
        slot = graft.all_slots[0]
        assert slot.up_head.grad.any()
        assert slot.down_head.grad.any()
        assert slot.layer_embedding.grad.any()

    def test_starts_that_no_network_can_share_are_refused(self):
        of = {"kind": "magnitude"}
        with pytest.raises(SiteError, match="magnitude_invariant: true"):
            grafted(of=of, role=("q",))
        torch.manual_seed(0)
        model = Classifier(WIDTH, 24, 4, depth=DEPTH, classes=3).eval()
        before = output(model)
        what = {"kind": "hyper", "of": of, "magnitude_invariant": True}
        fg.graft(model, {"parts": [{"where": {"role": "q"}, "what": what}], "heads": "none"})
        close(output(model), before, 1e-5)

    def test_invariant_codes_have_one_length(self):
        for z in (torch.zeros(7), torch.linspace(0, 1, 7), torch.randn(7)):
            assert float(invariant(z).norm()) == pytest.approx(math.sqrt(7))
        assert invariant(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1, 0, 0, 1], abs=1e-6)

    def test_without_what_is_generated_the_invariant_form_is_the_kind_itself(self):
        model, graft = grafted(magnitude_invariant=True)
        with torch.no_grad():
            for slot in graft.all_slots:
                for name in ("down", "down_bias", "up", "up_bias"):
                    getattr(slot, f"{name}_head").zero_()
                    getattr(slot, f"{name}_head_bias").zero_()
        live = output(model)
        plain_model, plain = grafted({"kind": "bottleneck", "width": RANK})
        with torch.no_grad():
            for slot, own in zip(graft.all_slots, plain.all_slots, strict=True):
                for name, parameter in own.named_parameters():
                    parameter.copy_(getattr(slot, f"{name}_own"))
        identical(output(plain_model), live)


class TestTemplates:
    def test_widths_share_a_template_that_kernels_widen(self):
        model = torch.nn.Sequential(*[torch.nn.Linear(8 * 2**i, 8 * 2 ** (i + 1)) for i in range(3)])
        of = {"kind": "bottleneck", "width": 4}
        what = {"kind": "hyper", "of": of, "places": [], "template": 16, **SMALL}
        graft = fg.graft(model, {"parts": [{"where": {"type": "linear"}, "what": what}], "heads": "none"})
        kernels = [tuple(slot.down_kernel.shape) for slot in graft.all_slots]
        assert kernels == [(1, 1), (1, 2), (1, 4)]
        first, second, third = graft.all_slots
        assert first.down_kernel.item() == 1
        assert first.down_head is second.down_head is third.down_head
        assert tuple(third.delta.made(third).down.shape) == (4, 64)

    def test_a_template_that_divides_no_width_is_refused(self):
        with pytest.raises(SiteError, match="template 5 does not divide 16"):
            grafted(template=5)


def with_prototypes(**settings):
    torch.manual_seed(0)
    model = Classifier(WIDTH, 24, 4, depth=DEPTH, classes=3).train()
    graft = fg.graft(model, "pha", width=RANK, **SMALL, **settings)
    optimizer = torch.optim.AdamW(graft.parameter_groups(lr=0.02))
    return model, graft, fg.Control(graft, optimizer, total_steps=40), optimizer


class TestPrototypes:
    def test_the_retriever_counts_once(self):
        generator = (3 + DEPTH) * EMBEDDING + network(2 * EMBEDDING) + (CODE + 1) * ADAPTER
        retriever = WIDTH * HIDDEN + HIDDEN + HIDDEN * EMBEDDING + EMBEDDING
        assert count("pha", tasks=3, width=RANK, **SMALL) == generator + retriever

    def test_contrast_trains_the_retriever_and_the_embeddings_alone(self):
        model, graft, control, _ = with_prototypes(tasks=2)
        graft.task = [0, 1, 0, 1]
        model(IDS)
        control.before_step()
        control.penalty().backward()
        reached = {name.rpartition("/")[2] for name, p in graft.named_parameters() if p.grad is not None}
        assert reached == {"task_embedding", *RETRIEVER}
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    def test_one_task_has_nothing_to_contrast_with(self):
        model, _, control, _ = with_prototypes(tasks=1)
        model(IDS)
        control.before_step()
        assert control.penalty() == 0.0

    def test_like_samples_close_and_others_far_cost_little(self):
        tasks = torch.tensor([0, 0, 1, 1])
        apart = torch.eye(2)[tasks]
        assert among_samples(apart, tasks, 0.1) < 1e-3 < among_samples(apart, tasks[[0, 2, 1, 3]], 0.1)
        assert among_samples(torch.eye(4)[:2], torch.tensor([0, 1]), 0.1) == 0

    def test_samples_find_their_task(self):
        model, graft, control, optimizer = with_prototypes(tasks=["even", "odd"])
        graft.task = ["even", "even", "odd", "odd"]
        for _ in range(40):
            control.before_step()
            model(IDS)
            control.penalty().backward()
            control.after_backward(IDS)
            control.before_update()
            optimizer.step()
            optimizer.zero_grad()
            control.after_step()
        graft.task = "odd"
        model(IDS)
        assert fg.nearest_tasks(graft) == ["even", "even", "odd", "odd"]
        graft.task = fg.nearest_tasks(graft)
        copy.deepcopy(model)(IDS)

    def test_without_a_retriever_there_is_nothing_to_find(self):
        _, graft = grafted()
        with pytest.raises(RecipeError, match="retriever: true"):
            fg.nearest_tasks(graft)
        data = {**graft.recipe.data(), "control": ["prototypes"]}
        model = Classifier(WIDTH, 24, 4, depth=DEPTH, classes=3)
        other = fg.graft(model, data)
        control = fg.Control(other, torch.optim.SGD(other.parameters(), lr=0.1), total_steps=1)
        with pytest.raises(RecipeError, match="retriever: true"):
            control.before_step()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"of": {"kind": "sparse"}}, "cannot be generated"),
        ({"of": {"kind": "full"}}, "cannot be generated"),
        ({"of": {"kind": "hyper"}}, "cannot be generated"),
        ({"of": {"kind": "bottleneck", "projection": "kronecker"}}, "shares its tensors"),
        ({"tasks": []}, "at least one name"),
        ({"tasks": ["a", "a"]}, "each once"),
        ({"conditions": ["layer"]}, "other than layer and position"),
    ],
)
def test_settings_that_make_no_sense_are_refused(what, says):
    with pytest.raises(FinegraftError, match=says):
        grafted({"kind": "hyper", **what})


def test_settings_of_the_generated_kind_are_overridden_by_name():
    recipe = resolve("hyperformer++", width=3, activation="leaky_relu")
    hyper = recipe.parts[0].what[0]
    assert (hyper.of.width, hyper.activation, hyper.of.activation) == (3, "leaky_relu", "gelu")
    assert resolve({"parts": [{"where": {"role": "ffn"}, "what": "hyper"}]}, width=3).parts[0].what[0].of.width == 3
