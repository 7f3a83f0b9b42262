"""Types, roles, layers, shapes and ties of every model of the zoo are those written down by hand."""

import pytest
import torch
from torch import nn

from finegraft.errors import SiteError
from finegraft.locate import sites
from tests.locate.expected import TABLES, Row, rows
from tests.models import zoo


def test_every_model_of_the_zoo_has_a_table():
    assert sorted(TABLES) == sorted(zoo.names())


@pytest.mark.parametrize("name", zoo.names())
def test_sites_are_those_written_down(name):
    model, _ = zoo.build(name)
    found = {
        site.name: Row(site.type, site.role, site.layer, site.shape, tuple(alias for alias, _, _ in site.aliases))
        for site in sites(model)
        if site.kind in ("layer", "tensor")
    }
    assert found == rows(name)


@pytest.mark.parametrize("name", zoo.names())
def test_names_lead_to_the_tensor(name):
    model, _ = zoo.build(name)
    for site in sites(model).where():
        full = f"{site.name}.{site.tensor}" if site.kind == "layer" else site.name
        assert model.get_parameter(full) is site.parameter
        assert site.module.get_parameter(site.tensor) is site.parameter
        for alias, module, attribute in site.aliases:
            assert model.get_parameter(alias) is site.parameter
            assert getattr(module, attribute) is site.parameter


@pytest.mark.parametrize("name", zoo.names())
def test_names_are_unique(name):
    model, _ = zoo.build(name)
    names = [site.name for site in sites(model)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", zoo.names())
def test_fans_are_those_of_the_canonical_matrix(name):
    model, _ = zoo.build(name)
    for site in sites(model).where():
        matrix = site.op.matrix(site.parameter)
        assert matrix.shape == (*site.batch, site.fan_out, site.fan_in), site.name
        assert torch.equal(site.op.restore(matrix, site.shape), site.parameter), site.name


@pytest.mark.parametrize(
    ("model", "site", "fans"),
    [
        ("llama", "model.layers.0.self_attn.k_proj", ((), 16, 32)),
        ("gpt2", "transformer.h.0.attn.c_attn", ((), 96, 32)),
        ("resnet", "layer1.0.conv2", ((), 8, 4 * 9)),
        ("llama", "model.embed_tokens", ((), 64, 32)),
        ("bert", "bert.embeddings.LayerNorm", ((), 32, 1)),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj", ((4,), 96, 32)),
        ("clip", "logit_scale", ((), 1, 1)),
    ],
)
def test_fans_count_outputs_and_inputs(model, site, fans):
    found = sites(zoo.build(model)[0])[site]
    assert (found.batch, found.fan_out, found.fan_in) == fans


@pytest.mark.parametrize("name", zoo.names())
def test_the_models_are_small_and_reproducible(name):
    model, batch = zoo.build(name, seed=3)
    again, same = zoo.build(name, seed=3)
    other, _ = zoo.build(name, seed=4)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    with torch.no_grad():
        result = zoo.output(model(**batch))
        assert torch.equal(result, zoo.output(again(**same)))
        assert result.isfinite().all()
        assert not torch.equal(result, zoo.output(other(**batch)))


class TestOverrides:
    def test_change_roles_and_bring_sublayers_with_them(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.widen, self.narrow = nn.Linear(4, 8), nn.Linear(8, 4)

        model = nn.ModuleDict({"trunk": nn.ModuleList([Block(), Block()])})
        assert {site.role for site in sites(model)} == {"other"}
        found = sites(model, roles={r"\.widen$": "up", r"\.narrow$": "down"})
        assert [site.name for site in found.where(role="up")] == ["trunk.0.widen", "trunk.1.widen"]
        (first, second) = found.where(role="ffn")
        assert (first.entry, first.module) == (model["trunk"][0].widen, model["trunk"][0].narrow)
        assert (second.name, second.layer) == ("trunk.1.ffn", 1)

    def test_later_entries_win(self):
        found = sites(zoo.build("mlp")[0], roles={".*": "up", "^5$": "head"})
        assert [site.role for site in found] == ["up", "up", "up", "head"]

    @pytest.mark.parametrize(
        ("roles", "message"),
        [
            ({"classifier": "heads"}, r"'classifier' has the unknown role 'heads'; did you mean 'head'"),
            (
                {"clasifier": "head"},
                r"'clasifier' matches no layer or bare tensor; names like it: classifier",
            ),
            ({"(": "head"}, r"'\(' is not a valid regular expression"),
        ],
    )
    def test_mistakes_are_errors(self, roles, message):
        with pytest.raises(SiteError, match=message):
            sites(zoo.build("bert")[0], roles=roles)


class TestPaths:
    """Roles and layers of well-known networks outside the zoo, by their paths alone."""

    @pytest.mark.parametrize(
        ("path", "role", "layer"),
        [
            ("vision.blocks.3.attn.qkv", "qkv", 3),
            ("vision.blocks.3.attn.proj", "o", 3),
            ("encoder.layers.encoder_layer_5.mlp.0", "up", 5),
            ("encoder.layers.encoder_layer_5.mlp.3", "down", 5),
            ("vit.encoder.layer.2.attention.attention.query", "q", 2),
            ("vit.encoder.layer.2.attention.output.dense", "o", 2),
            ("vit.encoder.layer.2.output.dense", "down", 2),
            ("layers.1.attention.wq", "q", 1),
            ("layers.1.attention.wo", "o", 1),
            ("layers.1.feed_forward.w1", "gate", 1),
            ("layers.1.feed_forward.w2", "down", 1),
            ("layers.1.feed_forward.w3", "up", 1),
            ("transformer.h.4.mlp.fc_out", "down", 4),
            ("unet.transformer_blocks.0.attn1.to_out.0", "o", 0),
            ("encoder.layers.0.feed_forward.output_dense", "down", 0),
            ("fc1", "other", None),
            ("qa_outputs", "head", None),
            ("transformer.score", "head", None),
            ("bert.pooler.dense", "other", None),
        ],
    )
    def test_role_and_layer(self, path, role, layer):
        (site,) = sites(_module_at(path, nn.Linear(4, 4)))
        assert (site.name, site.role, site.layer) == (path, role, layer)

    def test_a_gate_beside_experts_is_a_router(self):
        mixture = nn.ModuleDict({"gate": nn.Linear(4, 2), "experts": nn.ModuleList([nn.Linear(4, 4)])})
        assert sites(_module_at("layers.0.mlp", mixture))["layers.0.mlp.gate"].role == "router"
        assert sites(_module_at("layers.0.mlp.gate", nn.Linear(4, 2)))["layers.0.mlp.gate"].role == "gate"

    def test_blocks_of_wrapped_and_staged_models(self):
        wrapped = nn.Sequential(zoo.build("bert")[0])
        assert sites(wrapped)["0.bert.encoder.layer.1.output.dense"].layer == 1
        assert sites(wrapped)["0.bert.embeddings.word_embeddings"].layer is None
        stages = nn.ModuleList(nn.ModuleDict({"blocks": _blocks(count)}) for count in (1, 2))
        found = sites(nn.ModuleDict({"stages": stages}))
        assert [site.layer for site in found.where(role="o")] == [0, 1, 2]


def _module_at(path: str, module: nn.Module) -> nn.Module:
    for segment in reversed(path.split(".")):
        outer = nn.Module()
        outer.add_module(segment, module)
        module = outer
    return module


def _blocks(count: int) -> nn.ModuleList:
    def block() -> nn.Module:
        attention = nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)})
        mlp = nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})
        return nn.ModuleDict({"attn": attention, "mlp": mlp})

    return nn.ModuleList(block() for _ in range(count))
