"""Side networks: what they keep of the base, how they generate, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finegraft as fg
from finegraft.deltas.side_network import SideNetwork
from finegraft.errors import NotMergeable, SiteError
from finegraft.locate.find import sites
from finegraft.testing import saved_bytes
from finegraft.testing.bits import snapshot, unchanged
from tests.models import zoo

SIDE = {"heads": "none", "parts": [{"where": {"role": "network"}, "what": {"kind": "side-network", "reduction": 4}}]}


def disturbed(graft, size=0.05):
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=rng))
    return graft


def side(name, method=SIDE, **settings):
    model, batch = zoo.build(name)
    return model, batch, disturbed(fg.graft(model, method, **settings))


def graph(tensor):
    """Every node behind a tensor."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [after for after, _ in node.next_functions]
    return seen


@pytest.mark.parametrize("method", [SIDE, "lst", "qst", "levi"], ids=["side", "lst", "qst", "levi"])
@pytest.mark.parametrize("name", ["bert", "llama", "vit", "t5-gated"])
def test_the_graph_of_the_loss_holds_no_tensor_of_the_base(name, method):
    model, batch, graft = side(name, method)
    given = []
    for block in sites(model).where(role="network")[0].network.blocks[:-1]:
        block.register_forward_hook(lambda module, args, y: given.append(y[0] if isinstance(y, tuple) else y))
    y = zoo.output(model(**batch))
    own = {id(parameter) for parameter in graft.parameters()}
    reached = [node.variable for node in graph(y) if hasattr(node, "variable")]
    assert reached
    assert all(id(variable) in own for variable in reached)
    assert given
    assert all(tensor.grad_fn is None for tensor in given)


def test_nothing_of_the_base_is_kept_but_what_the_down_maps_read():
    """Kept are the base's states, and tensors of the side network's width and of the last layers."""
    model, batch, _ = side("llama")
    states, kept = [], []
    site = sites(model).where(role="network")[0]
    for block in site.network.blocks:
        block.register_forward_hook(lambda module, args, y: states.append(y.untyped_storage()._cdata))

    def pack(tensor):
        kept.append((tuple(tensor.shape), tensor.untyped_storage()._cdata))
        return tensor

    inside = []
    site.module.register_forward_hook(lambda *_: inside.append(len(kept)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    assert inside == [0], "the base's blocks saved tensors"
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    wide = [shape for shape, key in kept if key not in own and key not in states and max(shape, default=0) >= 48]
    assert all(shape[-1] == zoo.VOCABULARY for shape in wide), f"tensors as wide as the base's FFN are kept: {wide}"


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_it_keeps_much_less_than_low_rank_changes_do(name):
    """Even beside two blocks as narrow as these; benchmarks/side_memory.py has real shapes."""
    model, batch, _ = side(name)
    held = int(saved_bytes(model.train(), lambda: model(**batch)))
    other, batch = zoo.build(name)
    fg.graft(other, "lora", rank=2)
    assert held < 0.6 * int(saved_bytes(other.train(), lambda: other(**batch)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("method", ["lst", "qst"])
def test_generation_with_a_cache_gives_the_same_tokens(name, method):
    model, batch, _ = side(name, method)
    ids = torch.cat([torch.zeros(2, 2, dtype=torch.long), batch["input_ids"][:, :4]], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    for beams in (1, 2):
        settings = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 5}
        with_cache = model.generate(ids, attention_mask=mask, use_cache=True, **settings)
        without = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
        assert torch.equal(with_cache, without)


def test_cached_steps_give_the_logits_of_a_whole_pass():
    model, batch, _ = side("llama")
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        past, steps = None, []
        for part in ids.split([3, 1, 2, 1], dim=1):
            out = model(part, past_key_values=past, use_cache=True)
            past, _ = out.past_key_values, steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_two_side_networks_share_a_cache():
    model, batch, _ = side("llama")
    disturbed(fg.graft(model, SIDE, seed=1))
    ids = batch["input_ids"][:, :4]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(ids, use_cache=True, **settings), model.generate(ids, use_cache=False, **settings)
    )


def test_generation_of_an_encoder_and_decoder_with_a_cache():
    model, batch, _ = side("t5-gated")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False}
    with_cache = model.generate(**inputs, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(**inputs, use_cache=False, **settings))


def test_a_cache_begun_without_the_graft_is_refused():
    model, batch, graft = side("llama")
    with graft.disabled():
        past = model(batch["input_ids"][:, :4], use_cache=True).past_key_values
    with pytest.raises(SiteError, match="begun without this graft"):
        model(batch["input_ids"][:, 4:], past_key_values=past)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "t5-gated"])
def test_padding_does_not_reach_tokens(name):
    model, batch, _ = side(name)
    with torch.no_grad():
        before = zoo.output(model(**batch))
        if "attention_mask" not in batch:
            return
        other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)}
        after = zoo.output(model(**other))
    kept = batch["attention_mask"].bool() if name == "llama" else slice(None)
    torch.testing.assert_close(after[kept], before[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_the_bases_blocks(reentrant):
    model, batch, graft = side("llama")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({name: p.grad.clone() for name, p in graft.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_changes_of_the_base_beneath_train_along():
    model, batch, _ = side("llama")
    lora = disturbed(fg.graft(model, "lora", rank=2))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in lora.parameters())


def test_the_base_is_as_before_and_a_merge_says_no():
    model, batch = zoo.build("bert")
    before = snapshot(model)
    graft = disturbed(fg.graft(model, "lst"))
    with pytest.raises(NotMergeable, match="'side-network'"):
        graft.merge()
    zoo.output(model.train()(**batch)).sum().backward()
    model.eval()
    graft.detach()
    unchanged(snapshot(model), before)


def test_count_is_that_of_the_formula():
    model, _, graft = side("llama")
    d, w, heads, kv, a, inner, n = 32, 8, 4, 2, 2, 12, 2
    blocks = n * (2 * heads * a * w + 2 * kv * a * w + 3 * inner * w) + (2 * n + 1) * w
    assert graft.num_trainable == blocks + (n + 1) * (d * w + w) + n + d * w + d
    assert model is graft.model


def test_some_side_blocks_can_be_left_out():
    delta = SideNetwork(drop_every=4)
    assert delta._kept(12) == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert SideNetwork(drop_every=1)._kept(3) == [2]
    assert side("bert", drop_every=2)[2].deltas["bert.encoder.layer/0.0"].gates.shape == (1,)


def test_side_blocks_are_cut_out_of_the_bases():
    model, _ = zoo.build("bert")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    slot = fg.graft(model, "lst", reduction=4).deltas["bert.encoder.layer/0.0"]
    channels = slot.down[0].argmax(dim=1)
    assert torch.equal(slot.down[0].sum(dim=1), torch.ones(8))
    up = base["bert.encoder.layer.1.intermediate.dense.weight"]
    rows = {tuple(row) for row in up[:, channels].tolist()}
    assert {tuple(row) for row in slot.inner[1].tolist()} <= rows
    query = base["bert.encoder.layer.0.attention.self.query.weight"].view(4, 8, 32)[..., channels]
    for head in range(4):
        assert {tuple(r) for r in slot.to_query[0, head].tolist()} <= {tuple(r) for r in query[head].tolist()}


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi3"])
def test_fused_queries_are_cut_by_head(name):
    """What is cut out of a fused layer is what would be cut out of its parts, so no entry is drawn."""
    model, _ = zoo.build(name)
    slot = fg.graft(model, "lst", reduction=4).all_slots[0]
    stored = {round(v, 6) for p in model.parameters() for v in p.flatten().tolist()}
    for tensor in (slot.to_query, slot.to_key, slot.to_value, slot.output, slot.inner, slot.outer):
        assert {round(v, 6) for v in tensor.flatten().tolist()} <= stored


def test_a_gate_towards_the_base_gives_the_base():
    model, batch = zoo.build("llama")
    with torch.no_grad():
        before = model(**batch).logits
        graft = fg.graft(model, "qst", mix_start=20.0)
        torch.testing.assert_close(model(**batch).logits, before, atol=1e-5, rtol=1e-5)
        graft.all_slots[0].mix.fill_(1.0)
        share = torch.sigmoid(graft.all_slots[0].mix)
        assert 0.7 < float(share[0]) < 0.75
        assert not torch.allclose(model(**batch).logits, before, atol=1e-3)


def test_pooled_states_train_no_down_map():
    _, _, graft = side("llama", "qst", down="max-pool")
    assert not [name for name, _ in graft.named_parameters() if "down" in name]


def test_one_block_that_runs_several_times_has_no_network_site():
    assert not [site for site in sites(zoo.build("albert")[0]) if site.kind == "network"]


def test_an_encoder_that_is_attended_to_is_told_apart():
    found = {site.name: site.role for site in sites(zoo.build("t5-gated")[0]) if site.kind == "network"}
    assert found == {"encoder.block": "encoder", "decoder.block": "network"}


def test_masks_of_torchs_own_layers():
    model, batch, _ = side("torch-encoder")
    padding = torch.zeros(2, zoo.TOKENS, dtype=torch.bool)
    padding[1, -2:] = True
    other = batch["src"].clone()
    other[1, -2:] = 7.0
    with torch.no_grad():
        a, b = (model(x, src_key_padding_mask=padding) for x in (batch["src"], other))
        causal = nn.Transformer.generate_square_subsequent_mask(zoo.TOKENS)
        c, d = (model(x, mask=causal, is_causal=True) for x in (batch["src"], other))
    torch.testing.assert_close(a[~padding], b[~padding], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(c[1, :-2], d[1, :-2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-gated", "whisper"])
def test_no_position_sees_a_later_one(name):
    model, batch, _ = side(name)
    ids = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    batch = {key: value for key, value in batch.items() if key != "attention_mask"}
    other = batch[ids].clone()
    other[:, -1] = (other[:, -1] + 1) % zoo.VOCABULARY
    with torch.no_grad():
        y, z = (zoo.output(model(**given)) for given in (batch, {**batch, ids: other}))
    torch.testing.assert_close(y[:, :-1], z[:, :-1], atol=1e-5, rtol=1e-5)


def test_a_skipped_block_is_an_error():
    model, batch, _ = side("bert")
    layers = model.bert.encoder.layer
    model.bert.encoder.layer = nn.ModuleList([layers[0], nn.Identity(), layers[1]])
    model.bert.encoder.layer[1].forward = lambda x, *_, **__: x
    model(**batch)
    model.bert.encoder.layer = nn.ModuleList([layers[1]])
    with pytest.raises(SiteError, match="of the 2 blocks"):
        model(**batch)
