"""Sublayers span from true input to true output; attention sites are the registry's true callers."""

import pytest
import torch
from torch import nn
from transformers import modeling_utils

from finegraft.grafting.make import graft
from finegraft.locate import sites
from tests.models import zoo

ENDS = {
    "bert": {
        "bert.encoder.layer.{}.attn": ("attention.self.query", "attention.output.dense"),
        "bert.encoder.layer.{}.ffn": ("intermediate.dense", "output.dense"),
    },
    "roberta": {
        "roberta.encoder.layer.{}.attn": ("attention.self.query", "attention.output.dense"),
        "roberta.encoder.layer.{}.ffn": ("intermediate.dense", "output.dense"),
    },
    "distilbert": {
        "distilbert.transformer.layer.{}.attn": ("attention.q_lin", "attention.out_lin"),
        "distilbert.transformer.layer.{}.ffn": ("ffn.lin1", "ffn.lin2"),
    },
    "llama": {
        "model.layers.{}.attn": ("self_attn.q_proj", "self_attn.o_proj"),
        "model.layers.{}.ffn": ("mlp", "mlp"),
    },
    "gpt2": {
        "transformer.h.{}.attn.sublayer": ("attn.c_attn", "attn.c_proj"),
        "transformer.h.{}.ffn": ("mlp.c_fc", "mlp.c_proj"),
    },
    "gpt-neox": {
        "gpt_neox.layers.{}.attn": ("attention.query_key_value", "attention.dense"),
        "gpt_neox.layers.{}.ffn": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    },
    "phi3": {
        "model.layers.{}.attn": ("self_attn.qkv_proj", "self_attn.o_proj"),
        "model.layers.{}.ffn": ("mlp.gate_up_proj", "mlp.down_proj"),
    },
    "mixtral": {
        "model.layers.{}.attn": ("self_attn.q_proj", "self_attn.o_proj"),
        "model.layers.{}.ffn": ("mlp", "mlp"),
    },
    "qwen2-moe": {
        "model.layers.{}.attn": ("self_attn.q_proj", "self_attn.o_proj"),
        "model.layers.{}.ffn": ("mlp", "mlp"),
    },
    "t5-gated": {
        "encoder.block.{}.attn": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o"),
        "encoder.block.{}.ffn": ("layer.1.DenseReluDense", "layer.1.DenseReluDense"),
        "decoder.block.{}.attn": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o"),
        "decoder.block.{}.cross_attn": ("layer.1.EncDecAttention.q", "layer.1.EncDecAttention.o"),
        "decoder.block.{}.ffn": ("layer.2.DenseReluDense", "layer.2.DenseReluDense"),
    },
    "vit": {
        "vit.layers.{}.attn": ("attention.q_proj", "attention.o_proj"),
        "vit.layers.{}.ffn": ("mlp.fc1", "mlp.fc2"),
    },
    "whisper": {
        "model.encoder.layers.{}.attn": ("self_attn.q_proj", "self_attn.out_proj"),
        "model.encoder.layers.{}.ffn": ("fc1", "fc2"),
        "model.decoder.layers.{}.attn": ("self_attn.q_proj", "self_attn.out_proj"),
        "model.decoder.layers.{}.cross_attn": ("encoder_attn.q_proj", "encoder_attn.out_proj"),
        "model.decoder.layers.{}.ffn": ("fc1", "fc2"),
    },
    "torch-encoder": {
        "layers.{}.attn": ("self_attn", "self_attn"),
        "layers.{}.ffn": ("linear1", "linear2"),
    },
}  # fmt: skip
NORM_FIRST = [
    "llama",
    "llama-tied",
    "gpt2",
    "gpt-neox",
    "phi3",
    "mixtral",
    "qwen2-moe",
    "t5-ungated",
    "t5-gated",
]
NORM_FIRST += ["vit", "clip", "whisper", "ast"]
NORM_LAST = ["bert", "bert-mlm", "roberta", "distilbert", "albert", "torch-encoder"]
WITHOUT = ["mlp", "resnet", "cifar-resnet"]


def test_every_model_is_of_one_of_these_shapes():
    assert sorted(NORM_FIRST + NORM_LAST + WITHOUT) == sorted(zoo.names())


@pytest.mark.parametrize("name", ENDS)
def test_entries_and_exits(name):
    model, _ = zoo.build(name)
    found = {
        site.name: (site.layer, site.role, site.entry, site.module) for site in sites(model).where(kind="sublayer")
    }
    expected = {}
    for pattern, (entry, exit) in ENDS[name].items():
        for layer in (0, 1):
            block = pattern.format(layer).removesuffix(".sublayer").rpartition(".")[0]
            role = "ffn" if pattern.endswith("ffn") else "attn"
            ends = (model.get_submodule(f"{block}.{entry}"), model.get_submodule(f"{block}.{exit}"))
            expected[pattern.format(layer)] = (layer, role, *ends)
    assert found == expected


@pytest.mark.parametrize("name", NORM_FIRST + NORM_LAST)
def test_sublayers_know_their_widths_and_hold_nothing(name):
    model, _ = zoo.build(name)
    for site in sites(model).where(kind="sublayer"):
        assert (site.shape, site.fan_out, site.fan_in, site.channels) == ((32, 32), 32, 32, 32)
        assert site.parameter is None
        assert site.num_parameters == 0


def _first(value):
    return value[0] if isinstance(value, tuple) else value


def _passes(model, batch, modules):
    """First input and output of each of these modules, in one forward pass."""
    seen = {}

    def record(module, args, kwargs, result):
        given = args[0] if args else next(iter(kwargs.values()))
        seen.setdefault(module, (given, _first(result)))

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", NORM_FIRST)
def test_a_block_that_normalises_first_adds_its_sublayers_to_its_input(name):
    model, batch = zoo.build(name)
    found = sites(model).where(kind="sublayer")
    blocks = {site.block: model.get_submodule(site.block) for site in found}
    seen = _passes(model, batch, [*blocks.values(), *(site.module for site in found)])
    for path, block in blocks.items():
        before, after = seen[block]
        added = sum(seen[site.module][1] for site in found if site.block == path)
        torch.testing.assert_close(before + added, after)


@pytest.mark.parametrize("name", NORM_LAST)
def test_a_block_that_normalises_last_normalises_input_plus_sublayer(name):
    model, batch = zoo.build(name)
    found = sites(model).where(kind="sublayer")
    norms = [site.module for site in sites(model).where(role="norm", layer=[0, "1?"])]
    seen = _passes(model, batch, [*norms, *(end for site in found for end in (site.entry, site.module))])
    normalised = [seen[norm][0] for norm in norms]
    for site in found:
        summed = seen[site.entry][0] + seen[site.module][1]
        assert any(torch.allclose(summed, given, atol=1e-6) for given in normalised), site.name


@pytest.mark.parametrize("name", WITHOUT)
def test_models_without_recognised_blocks_have_no_sublayers(name):
    model, _ = zoo.build(name)
    assert {site.kind for site in sites(model)} == {"layer"}


@pytest.mark.parametrize(("extra", "expected"), [({}, ["layers.0.attn"]), ({"norm": nn.LayerNorm(4)}, [])])
def test_bare_attention_with_a_norm_of_its_own_is_no_sublayer(extra, expected):
    """As in XLNet, whose attention module adds the residual itself."""
    attention = nn.ModuleDict(extra)
    for name in ("q", "k", "v", "o"):
        attention.register_parameter(name, nn.Parameter(torch.randn(4, 4)))
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": attention})])})
    assert [site.name for site in sites(model) if site.kind == "sublayer"] == expected


@pytest.mark.parametrize("name", zoo.names())
def test_attention_sites_are_the_modules_that_call_the_registry(name, monkeypatch):
    model, batch = zoo.build(name)
    called = []
    registry = modeling_utils.ALL_ATTENTION_FUNCTIONS
    attend = registry["sdpa"]

    def spy(module, *args, **kwargs):
        called.append(module)
        return attend(module, *args, **kwargs)

    monkeypatch.setitem(registry, "sdpa", spy)
    model(**batch)
    found = [site for site in sites(model) if site.kind == "attention"]
    assert {id(site.module) for site in found} == {id(module) for module in called}
    for site in found:
        assert model.get_submodule(site.name) is site.module
        assert (site.role, site.type) == ("attention", "attention")
        assert f".{site.layer}." in f".{site.name}."


@pytest.mark.parametrize(("name", "width"), [("bert", 32), ("llama", 16), ("gpt2", 32), ("phi3", 16)])
def test_attention_sites_know_the_width_of_their_keys(name, width):
    found = sites(zoo.build(name)[0]).where(role="attention")
    assert {site.shape for site in found} == {(width,)}


def test_both_attentions_of_a_decoder_are_found():
    found = sites(zoo.build("t5-gated")[0]).where(role="attention", name="decoder.block.1.*")
    assert [site.name for site in found] == [
        "decoder.block.1.layer.0.SelfAttention",
        "decoder.block.1.layer.1.EncDecAttention",
    ]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("t5-gated", []),  # its first block works out positions for all others
        ("resnet", []),
    ],
)
def test_blocks_take_and_give_hidden_states(name, blocks):
    model, _ = zoo.build(name)
    found = [site for site in sites(model) if site.type == "block"]
    assert [site.name for site in found] == blocks
    for site in found:
        assert site.entry is site.module is model.get_submodule(site.name)
        assert (site.kind, site.role, site.inputs, site.channels) == ("block", "block", 32, 32)


@pytest.mark.parametrize("name", ["bert", "llama", "t5-gated", "mixtral"])
def test_sublayers_of_a_grafted_model_are_those_of_the_base(name):
    model, _ = zoo.build(name)
    before = [(site.name, site.entry, site.module) for site in sites(model)]
    graft(model, {"parts": [{"where": {"role": ["ffn", "attn"]}, "what": "bottleneck"}], "heads": "none"})
    assert [(site.name, site.entry, site.module) for site in sites(model)] == before
