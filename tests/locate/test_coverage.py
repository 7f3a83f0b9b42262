"""Every number of a model belongs to exactly one site, once, however many names it has."""

import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from finegraft.locate import sites
from tests.models import zoo


@pytest.mark.parametrize("name", zoo.names())
def test_every_parameter_belongs_to_exactly_one_site(name):
    model, _ = zoo.build(name)
    owned = Counter(id(t) for site in sites(model) for t in (site.parameter, site.bias) if t is not None)
    assert owned == Counter(id(p) for p in model.parameters())


@pytest.mark.parametrize("name", zoo.names())
def test_counts_add_up_to_the_model(name):
    model, _ = zoo.build(name)
    assert sum(site.num_parameters for site in sites(model)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", zoo.names())
def test_every_name_of_a_main_tensor_is_listed(name):
    model, _ = zoo.build(name)
    names: dict[int, set[str]] = {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(full)
    for site in sites(model).where():
        own = f"{site.name}.{site.tensor}" if site.kind == "layer" else site.name
        assert {own, *(alias for alias, _, _ in site.aliases)} == names[id(site.parameter)]


def test_a_tied_table_is_the_embedding_even_when_the_output_comes_first():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head, self.embed = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4)
            self.lm_head.weight = self.embed.weight

    model = Model()
    (site,) = sites(model)
    assert (site.name, site.role, site.module) == ("embed", "embed", model.embed)
    assert site.aliases == (("lm_head.weight", model.lm_head, "weight"),)


def test_a_module_under_two_names_is_found_once_under_the_first():
    shared = nn.Linear(4, 4)
    (site,) = sites(nn.ModuleDict({"first": shared, "second": shared}))
    assert (site.name, site.aliases) == ("first", ())


def test_tied_layers_with_biases_of_their_own_leave_no_bias_out():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    found = sites(nn.ModuleDict({"first": first, "second": second}))
    assert [(site.name, site.kind, site.parameter) for site in found] == [
        ("first", "layer", first.weight),
        ("second.bias", "tensor", second.bias),
    ]


class TestParametrized:
    def test_a_single_original_keeps_the_layer(self):
        layer = parametrizations.orthogonal(nn.Linear(4, 4))
        (site,) = sites(layer)
        assert (site.kind, site.type, site.shape) == ("layer", "linear", (4, 4))

    def test_split_originals_are_bare_tensors(self):
        model = nn.ModuleDict({"conv": parametrizations.weight_norm(nn.Conv1d(3, 5, 2))})
        found = sites(model)
        assert {site.name for site in found} == {
            "conv.bias",
            "conv.parametrizations.weight.original0",
            "conv.parametrizations.weight.original1",
        }
        assert {site.type for site in found} == {"tensor"}
        assert {id(site.parameter) for site in found} == {id(p) for p in model.parameters()}


def test_what_a_graft_adds_is_no_site():
    model = zoo.build("bert")[0]
    before = [site.name for site in sites(model)]
    query = model.bert.encoder.layer[0].attention.self.query
    query.add_module("finegraft", nn.ModuleDict({"low": nn.Linear(32, 2)}))
    assert [site.name for site in sites(model)] == before


def test_integers_are_no_site():
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    assert [site.name for site in sites(nn.ModuleDict({"x": model}))] == ["x"]


def test_a_bare_parameter_at_the_root_is_found():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2))

    (site,) = sites(Model())
    assert (site.name, site.kind, site.fan_out, site.fan_in) == ("weight", "tensor", 3, 2)


def test_a_model_that_is_one_layer_is_its_own_site():
    (site,) = sites(nn.Linear(3, 2))
    assert (site.name, site.kind, site.shape) == ("", "layer", (2, 3))


def test_finding_costs_in_proportion_to_the_model():
    assert _calls(blocks=80) < 2.2 * _calls(blocks=40)


def _calls(blocks):
    """How many functions of Python run while sites are found and asked for."""
    model = nn.ModuleDict({"layers": nn.ModuleList(_block() for _ in range(blocks))})
    counts = Counter()
    sys.setprofile(lambda frame, event, argument: counts.update([event]))
    try:
        sites(model).where(role=["q", "v"], layer="last:10", name="layers.*")
    finally:
        sys.setprofile(None)
    return counts["call"]


def _block() -> nn.Module:
    attention = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    return nn.ModuleDict({"attn": attention, "up_proj": nn.Linear(2, 2), "down_proj": nn.Linear(2, 2)})
