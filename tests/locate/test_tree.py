"""The tree shows every site with its role, shape and numbers, and like blocks once."""

import pytest
from rich.console import Console
from torch import nn

from finegraft.locate import sites
from tests.models import zoo


def _shown(model, **settings) -> list[str]:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(sites(model).tree(**settings))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_plain_network_line_by_line():
    assert _shown(zoo.build("mlp")[0], title="plain") == [
        "plain  1,085 parameters",
        "├── 0  linear other 24×12  312",
        "├── 2  norm norm 24  48",
        "├── 3  linear other 24×24  600",
        "└── 5  linear other 5×24  125",
    ]


def test_like_blocks_are_shown_once():
    assert _shown(zoo.build("llama-tied")[0]) == [
        "model  17,568 parameters",
        "└── model  17,568",
        "    ├── embed_tokens  embedding embed 64×32  2,048  = lm_head.weight",
        "    ├── layers  15,488",
        "    │   └── layers.0 … layers.1 (2 alike)  7,744 each",
        "    │       ├── self_attn  3,072",
        "    │       │   ├── q_proj  linear q 32×32  1,024",
        "    │       │   ├── k_proj  linear k 16×32  512",
        "    │       │   ├── v_proj  linear v 16×32  512",
        "    │       │   └── o_proj  linear o 32×32  1,024",
        "    │       ├── mlp  4,608",
        "    │       │   ├── gate_proj  linear gate 48×32  1,536",
        "    │       │   ├── up_proj  linear up 48×32  1,536",
        "    │       │   └── down_proj  linear down 32×48  1,536",
        "    │       ├── input_layernorm  norm norm 32  32",
        "    │       └── post_attention_layernorm  norm norm 32  32",
        "    └── norm  norm norm 32  32",
    ]


def test_blocks_that_differ_are_shown_apart():
    def block(width):
        return nn.ModuleDict({"linear": nn.Linear(2, width), "norm": nn.LayerNorm(2)})

    shown = _shown(nn.ModuleDict({"layers": nn.ModuleList([block(2), block(2), block(3), block(2)])}))
    assert [line for line in shown if "layers." in line or line.endswith(("13", "10"))] == [
        "    ├── layers.0 … layers.1 (2 alike)  10 each",
        "    ├── 2  13",
        "    └── 3  10",
    ]


def test_a_scalar_and_odd_names_are_shown_as_they_are():
    model = nn.ParameterDict({"[bold]": nn.Parameter(nn.Linear(1, 1).bias.detach().reshape(()))})
    assert _shown(model, title="[x]")[0] == "[x]  1 parameters"
    assert "[bold]  tensor other scalar  1" in _shown(model)[1]


@pytest.mark.parametrize("name", zoo.names())
def test_the_total_is_that_of_the_model(name):
    model, _ = zoo.build(name)
    total = sum(p.numel() for p in model.parameters())
    assert _shown(model)[0] == f"model  {total:,} parameters"
