"""Prompts beside other changes: parts of one graft, starts from another's file, controllers."""

import pytest
import torch

from finegraft.control import driver
from finegraft.errors import RecipeError, StoreError
from finegraft.grafting import graft, load
from finegraft.grafting.start_from import start_from
from finegraft.registry import controllers
from tests.models import zoo

MIXED = {
    "parts": [
        {"where": {"role": ["q", "v"]}, "what": {"kind": "low-rank", "rank": 2}},
        {"where": {"role": "ffn"}, "what": {"kind": "bottleneck", "width": 4, "placement": "parallel"}},
        {"where": {"role": "attention"}, "what": {"kind": "prefix", "length": 8}},
        {"where": {"type": ["linear", "norm"], "role": "!head"}, "what": "bias"},
    ],
    "heads": "none",
}


def trained(name="bert", recipe=MIXED, steps=6):
    model, batch = zoo.build(name)
    batch = batch | {"labels": torch.tensor([0, 1])}
    made = graft(model, recipe)
    optimizer = torch.optim.AdamW(made.parameter_groups(lr=3e-3))
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, batch, made, losses


def test_a_mix_trains_saves_loads_and_its_parts_switch_one_by_one(tmp_path):
    model, batch, made, losses = trained()
    assert losses[-1] < losses[0]
    assert made.parts == (0, 1, 2, 3)
    twin, _ = zoo.build("bert")
    loaded = load(made.save(tmp_path / "mixed"), twin)
    base, _ = zoo.build("bert")
    found = []
    with torch.no_grad():
        for parts in ((), (0,), (1,), (2,), (3,), (0, 2), (0, 1, 2, 3)):
            made.parts = loaded.parts = parts
            assert made.parts == parts
            found.append(model(**batch).logits)
            torch.testing.assert_close(twin(**batch).logits, found[-1])
        assert torch.equal(found[0], base(**batch).logits)
        assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
        for part in range(4):
            single, _ = zoo.build("bert")
            alone = graft(single, MIXED)
            alone.load_state(made.state())
            alone.parts = (part,)
            torch.testing.assert_close(single(**batch).logits, found[part + 1])
    made.parts = (0,)
    again = load(made.save(tmp_path / "again"), zoo.build("bert")[0])
    assert again.parts == (0, 1, 2, 3), "what is out of force is saved all the same"


def test_parts_are_told_apart_from_those_that_are_not_there():
    model, _ = zoo.build("bert")
    made = graft(model, "lora", heads="none")
    with pytest.raises(RecipeError, match="has no part 3"):
        made.parts = (3,)
    for strange in (0, None, [True], ["ffn"]):
        with pytest.raises(RecipeError, match="list of their numbers|has no part"):
            made.parts = strange
    made.parts = ()
    with pytest.raises(RecipeError, match="out of force"):
        made.merge()
    made.parts = (0,)
    made.merge()
    with pytest.raises(RecipeError, match="call unmerge"):
        made.parts = ()


def test_a_graft_starts_from_the_file_of_another_without_its_head(tmp_path):
    recipe = {"parts": [{"where": {"role": "input"}, "what": {"kind": "prompt", "length": 3}}]}
    model, batch, made, _ = trained(recipe=recipe)
    path = made.save(tmp_path / "source")
    other, _ = zoo.build("bert")
    fresh = graft(other, recipe, seed=5)
    assert start_from(fresh, path) == ["bert.input/0.0"]
    del batch["labels"]
    with torch.no_grad():
        features = model.bert(**batch).last_hidden_state
        assert torch.equal(other.bert(**batch).last_hidden_state, features)
        assert not torch.equal(other(**batch).logits, model(**batch).logits)
    short = graft(
        zoo.build("bert")[0], {"parts": [{"where": {"role": "input"}, "what": {"kind": "prompt", "length": 2}}]}
    )
    with pytest.raises(StoreError, match="keep lengths"):
        start_from(short, path)
    with pytest.raises(StoreError, match="holds no tensors"):
        start_from(graft(zoo.build("bert")[0], "lora"), path)
    merged = graft(zoo.build("bert")[0], "lora")
    merged.merge()
    with pytest.raises(RecipeError, match="is merged"):
        start_from(merged, path)
    fresh.detach()
    with pytest.raises(RecipeError, match="was detached"):
        start_from(fresh, path)
    with pytest.raises(RecipeError, match="start_from takes a graft"):
        start_from(path, fresh)


def test_rows_stay_near_their_start_and_labels_where_they_were():
    model, batch = zoo.build("llama")
    ids, types = [5, 9, 7, 11], [1, 2, 3, 4]
    made = graft(
        model,
        "cpt",
        length=4,
        start="text",
        tokens=ids,
        types=types,
        radius=0.4,
        template_radius=0.2,
    )
    table = model.get_input_embeddings().weight
    with torch.no_grad(), made.disabled():
        x = torch.cat([table[ids].expand(2, -1, -1), table[batch["input_ids"]]], dim=1)
        mask = torch.cat([torch.ones(2, 4, dtype=torch.long), batch["attention_mask"]], dim=1)
        shown = model(inputs_embeds=x, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(model(**batch).logits, shown)
    optimizer = torch.optim.SGD(made.parameters(), lr=10.0)
    control = driver.Control(made, optimizer, total_steps=2)
    for _ in range(2):
        control.before_step()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        control.before_update()
        optimizer.step()
        optimizer.zero_grad()
        control.after_step()
    (slot,) = made.all_slots
    moved = (slot.prompt - table[ids]).norm(dim=-1)
    radii = controllers["near-start"](types=types, radius=0.4, template_radius=0.2).radii(4, 32)
    torch.testing.assert_close(radii, torch.tensor([0.2, 0.4, 0.2, 0.0]) * (32 / 2048) ** 0.5)
    assert (moved <= radii + 1e-6).all()
    assert moved[:3].gt(0).all()
    assert torch.equal(slot.prompt[3], table[11])


def test_rows_that_do_not_fit_their_types_are_an_error():
    model, _ = zoo.build("llama")
    made = graft(model, "cpt", length=4, types=[2, 2])
    with pytest.raises(RecipeError, match="2 types for the 4 rows"):
        driver.Control(made, torch.optim.SGD(made.parameters(), lr=1.0), total_steps=1).before_step()
