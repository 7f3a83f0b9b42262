"""Prompts in the sequence: where they stand, what follows them, caches, padding, pooling and files."""

import pytest
import torch

from finegraft.errors import SiteError
from finegraft.grafting import graft, load
from finegraft.locate import sites
from finegraft.store import read
from tests.models import zoo

LENGTH = 3


def prompted(name, kind="prompt", where="input", **settings):
    model, batch = zoo.build(name)
    given = {"length": LENGTH} if kind != "attention-gate" else {}
    what = {"kind": kind, **given, **settings}
    made = graft(model, {"parts": [{"where": {"role": where}, "what": what}], "heads": "none"})
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model, batch, made


def prompt_of(made):
    (slot,) = made.all_slots
    return slot.delta.positions(slot)


def before(made, x):
    return torch.cat([prompt_of(made).expand(len(x), -1, -1), x], dim=1)


def longer(mask):
    return torch.cat([mask.new_ones(len(mask), LENGTH), mask], dim=1)


@torch.no_grad()
def test_a_language_model_reads_the_prompt_as_vectors_before_its_tokens():
    model, batch, made = prompted("llama")
    found = model(**batch, labels=batch["input_ids"])
    x = before(made, model.get_input_embeddings()(batch["input_ids"]))
    with made.disabled():
        expected = (
            model(inputs_embeds=x, attention_mask=longer(batch["attention_mask"])).logits[:, LENGTH:].contiguous()
        )
        loss = model.loss_function(expected, batch["input_ids"], model.config.vocab_size)
    torch.testing.assert_close(found.logits, expected)
    torch.testing.assert_close(found.loss, loss)


@torch.no_grad()
def test_a_classifier_pools_its_own_first_token():
    model, batch, made = prompted("bert")
    batch = batch | {"token_type_ids": (torch.arange(zoo.TOKENS) > 3).long().expand(2, -1)}
    found = model(**batch).logits
    x = before(made, model.get_input_embeddings()(batch["input_ids"]))
    types = torch.cat([torch.zeros(2, LENGTH, dtype=torch.long), batch["token_type_ids"]], dim=1)
    with made.disabled():
        mask = longer(batch["attention_mask"])
        states = model.bert(inputs_embeds=x, attention_mask=mask, token_type_ids=types).last_hidden_state
        expected = model.classifier(model.bert.pooler(states[:, LENGTH:]))
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_decoder_reads_what_the_encoder_made_of_the_prompt():
    model, batch, made = prompted("t5-gated")
    x = before(made, model.get_input_embeddings()(batch["input_ids"]))
    found = model(**batch).logits
    with made.disabled():
        expected = model(
            inputs_embeds=x,
            attention_mask=longer(batch["attention_mask"]),
            decoder_input_ids=batch["decoder_input_ids"],
        ).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["vit", "ast"])
@torch.no_grad()
def test_an_image_has_its_prompt_behind_the_class_tokens(name):
    model, batch, made = prompted(name)
    base = model.base_model
    found = base(**batch).last_hidden_state
    leading = sites(model).where(role="input")[0].input.leading
    x = base.embeddings(next(iter(batch.values())))
    x = torch.cat([x[:, :leading], prompt_of(made).expand(2, -1, -1), x[:, leading:]], dim=1)
    with made.disabled():
        for layer in base.layers:
            x = layer(x)
    x = base.layernorm(x)
    torch.testing.assert_close(found, torch.cat([x[:, :leading], x[:, leading + LENGTH :]], dim=1))


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "t5-gated"])
@pytest.mark.parametrize("kind", ["prompt", "decomposed-prompt"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(name, kind):
    model, batch, _ = prompted(name, kind)
    ids = batch["input_ids"][:1, :5]
    rest = {"decoder_input_ids": batch["decoder_input_ids"][:1]} if "decoder_input_ids" in batch else {}
    alone = zoo.output(model(input_ids=ids, attention_mask=torch.ones_like(ids), **rest))
    pad, ones = ids.new_zeros(1, 2), torch.ones_like(ids)
    for sides in ((pad, ids), (ids, pad)):
        mask = torch.cat([pad if side is pad else ones for side in sides], dim=1)
        y = zoo.output(model(input_ids=torch.cat(sides, dim=1), attention_mask=mask, **rest))
        own = y if rest else y[:, 2:] if sides[0] is pad else y[:, :5]
        torch.testing.assert_close(own, alone, atol=2e-5, rtol=1e-4)


CHANGES = [
    ("prompt", "input", {}),
    ("decomposed-prompt", "input", {"places": 6, "rank": 2}),
    ("prefix", "attention", {"residual_gate": True}),
    ("adaption-prompt", "attention", {}),
    ("attention-gate", "attention", {}),
]


@pytest.mark.parametrize(("kind", "where", "settings"), CHANGES)
@pytest.mark.parametrize("name", ["llama", "t5-gated"])
@torch.no_grad()
def test_generation_gives_the_same_tokens_with_and_without_a_cache(name, kind, where, settings):
    model, batch, made = prompted(name, kind, where, **settings)
    ids, mask = batch["input_ids"], batch["attention_mask"].flip(-1)
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, attention_mask=mask, **asked)
    full = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **asked)
    assert torch.equal(cached, full)
    beams = model.generate(input_ids=ids, attention_mask=mask, num_beams=2, **asked)
    assert torch.equal(beams, model.generate(input_ids=ids, attention_mask=mask, num_beams=2, use_cache=False, **asked))
    with made.disabled():
        model.generate(input_ids=ids, attention_mask=mask, **asked)


@torch.no_grad()
def test_logits_of_each_step_are_those_of_the_whole():
    model, batch, _ = prompted("gpt2")
    ids, mask = batch["input_ids"], batch["attention_mask"].flip(-1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    first = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], position_ids=places[:, :5], use_cache=True)
    rest = model(
        input_ids=ids[:, 5:], attention_mask=mask, position_ids=places[:, 5:], past_key_values=first.past_key_values
    )
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, atol=2e-5, rtol=1e-4)


def test_a_cache_that_began_otherwise_is_an_error():
    model, batch, made = prompted("llama")
    with made.disabled():
        cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(SiteError, match="cache was begun with 0"):
        model(input_ids=batch["input_ids"][:, :1], past_key_values=cache)
    made.scale = 0.5
    with pytest.raises(SiteError, match="runs the stack twice"):
        model(input_ids=batch["input_ids"], past_key_values=cache)
    made.scale = 1
    cache = model(**batch, use_cache=True).past_key_values
    with made.disabled(), pytest.raises(SiteError, match="begun with 3 positions of prompts, and there are 0 now"):
        model(input_ids=batch["input_ids"][:, :1], past_key_values=cache)


def test_what_a_prompt_cannot_do_is_an_error():
    model, _ = zoo.build("bert")
    recipe = {"parts": [{"where": {"role": "input"}, "what": {"kind": "prompt", "length": 16}}], "heads": "none"}
    with pytest.raises(SiteError, match="leaves no room"):
        graft(model, recipe)
    model, batch, _ = prompted("bert", length=12)
    with pytest.raises(SiteError, match="more than the 16 positions"):
        model(**batch)
    model, batch, made = prompted("llama")
    with pytest.raises(SiteError, match="dynamic cache"):
        model(input_ids=batch["input_ids"], attention_mask=torch.ones(2, 1, zoo.TOKENS, zoo.TOKENS))
    with pytest.raises(SiteError, match="static cache has 8: generate with a dynamic cache"):
        model.generate(batch["input_ids"], max_new_tokens=2, cache_implementation="static")
    model, batch, made = prompted("t5-gated")
    made.scale = 0.5
    with pytest.raises(SiteError, match="scales 1 and 0"):
        model(**batch)


def test_a_prompt_starts_from_tokens_or_the_vocabulary():
    model, _, made = prompted("llama", length=4, start="text", tokens=[5, 9, 7])
    made.detach()
    recipe = {"kind": "prompt", "length": 4, "start": "text", "tokens": [5, 9, 7]}
    made = graft(model, {"parts": [{"where": {"role": "input"}, "what": recipe}]})
    table = model.get_input_embeddings().weight
    assert torch.equal(prompt_of(made), table[[5, 9, 7, 5]])
    made.detach()
    made = graft(model, {"parts": [{"where": {"role": "input"}, "what": {"kind": "prompt", "start": "vocabulary"}}]})
    assert all((table == row).all(-1).any() for row in prompt_of(made))
    vit, _ = zoo.build("vit")
    with pytest.raises(SiteError, match="takes no token ids"):
        graft(vit, {"parts": [{"where": {"role": "input"}, "what": {"kind": "prompt", "start": "vocabulary"}}]})


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_blocks_that_are_checkpointed_give_the_same_gradients(name):
    model, batch, made = prompted(name)
    model.train()
    found = []
    for switch in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
        switch()
        made.model.zero_grad()
        first = zoo.output(model(**batch)).square().sum()
        second = zoo.output(model(**{n: t.flip(0) for n, t in batch.items()})).square().sum()
        (first + 2 * second).backward()
        found.append(next(made.parameters()).grad.clone())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("kind", "where"), [("prompt", "input"), ("prefix", "attention")])
def test_a_perceptron_is_folded_away_in_files(kind, where, tmp_path):
    model, batch, made = prompted("bert", kind, where, hidden=5)
    tensors, _ = read(made.save(tmp_path / "graft"))
    assert {name.rpartition("/")[2] for name in tensors} <= {"prompt", "keys", "values"}
    twin, _ = zoo.build("bert")
    loaded = load(tmp_path / "graft", twin, trainable=True)
    torch.testing.assert_close(twin(**batch).logits, model(**batch).logits)
    again = load(loaded.save(tmp_path / "again"), zoo.build("bert")[0])
    assert again.num_trainable == sum(t.numel() for t in tensors.values())
    resumed = prompted("bert", kind, where, hidden=5)
    resumed[2].load_state(made.state())
    assert torch.equal(resumed[0](**batch).logits, model(**batch).logits)


def test_the_first_layer_of_prefix_perceptrons_is_shared_within_a_stack():
    _, _, made = prompted("t5-gated", "prefix", "attention", hidden=5)
    tables = {id(slot.prefix) for slot in made.all_slots}
    assert len(made.all_slots) == 6
    assert len(tables) == 3, "encoder, decoder and cross-attention have one each"
    for slot in made.all_slots:
        assert slot.layer_1.shape == (64, 5)


def test_decomposed_prompts_count_as_the_paper_says():
    model, batch, made = prompted("llama", "decomposed-prompt", places=6, rank=2)
    assert made.num_trainable == LENGTH * 32 + (6 + 32) * 2
    assert 100 * 768 == 40 * 768 + (256 + 768) * 45
    (slot,) = made.all_slots
    with torch.no_grad():
        slot.b.zero_()
        plain = model(**batch).logits
        slot.b.normal_()
        assert torch.equal(model(**batch).logits[:, :1], plain[:, :1]) is False
        slot.a[:5].zero_()  # the last row belongs to the sixth token alone; the seventh has none
        changed = model(**batch).logits
    torch.testing.assert_close(changed[:, :5], plain[:, :5])
    assert not torch.allclose(changed[0, 5], plain[0, 5])


def test_rates_of_a_decomposed_prompt_are_two():
    model, _ = zoo.build("llama")
    rates = {group["name"]: group["lr"] for group in graft(model, "dept", length=LENGTH).parameter_groups(lr=1.0)}
    assert rates == {"change": 1.0, "a": 0.01, "b": 0.01}


def test_fused_prompts_without_maps_are_decomposed_prompts():
    model, batch, made = prompted("llama", "decomposed-prompt", spaces=1, rank=2)
    (slot,) = made.all_slots
    with torch.no_grad():
        slot.up.zero_()
    assert torch.equal(prompt_of(made), slot.prompt)
    made.detach()
    _, _, fused = prompted("llama", "decomposed-prompt", fusion=True, rank=2)
    (slot,) = fused.all_slots
    with torch.no_grad():
        slot.b.zero_()
    assert torch.equal(prompt_of(fused), slot.prompt)
    del model, batch
