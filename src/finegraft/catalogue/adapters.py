"""Adapters: small modules beside or after those of the base."""

from finegraft.catalogue.rows import method

_PARALLEL = {"kind": "bottleneck", "placement": "parallel", "scale": 4.0}

method(
    "houlsby",
    "Parameter-Efficient Transfer Learning for NLP",
    2019,
    "https://arxiv.org/abs/1902.00751",
    parts=[
        {"where": {"role": ["attn", "ffn"]}, "what": {"kind": "bottleneck", "init": "houlsby", "activation": "gelu"}},
        {"where": {"type": "norm", "role": "!head?"}, "what": {"kind": "full"}},
    ],
    train={"lr": 2e-3},
)
method(
    "pfeiffer",
    "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
    2021,
    "https://arxiv.org/abs/2005.00247",
    parts=[{"where": {"role": "ffn"}, "what": {"kind": "bottleneck", "init": "bert", "width": 24}}],
    train={"lr": 2e-3},
    note="On the sublayer's output before the residual, in post-norm models too.",
)
method(
    "parallel-adapter",
    "Towards a Unified View of Parameter-Efficient Transfer Learning",
    2022,
    "https://arxiv.org/abs/2110.04366",
    parts=[{"where": {"role": "ffn"}, "what": {**_PARALLEL, "width": 32}}],
    train={"lr": 1e-3},
)
method(
    "scaled-parallel-adapter",
    "Towards a Unified View of Parameter-Efficient Transfer Learning",
    2022,
    "https://arxiv.org/abs/2110.04366",
    parts=[
        {
            "where": {"role": "ffn"},
            "what": {"kind": "bottleneck", "placement": "parallel", "gate": "site", "scale": 1.0, "width": 32},
        }
    ],
    train={"lr": 1e-3},
    note="The scale trains, from 1; parallel-adapter has the paper's fixed scale of 4.",
)
method(
    "adapter-drop",
    "AdapterDrop: On the Efficiency of Adapters in Transformers",
    2021,
    "https://arxiv.org/abs/2010.11918",
    parts=[
        {"where": {"role": "ffn", "layer": "!first:40%"}, "what": {"kind": "bottleneck", "init": "bert", "width": 24}}
    ],
    train={"lr": 2e-3},
    note="No adapters in the lowest blocks, 4 of 12, through which then no gradient runs. skip=0.5 drops adapters at "
    "random while training, for one that may lose any of them.",
)
method(
    "mam",
    "Towards a Unified View of Parameter-Efficient Transfer Learning",
    2022,
    "https://arxiv.org/abs/2110.04366",
    parts=[
        {"where": {"role": "attention"}, "what": {"kind": "prefix", "length": 16}},
        {"where": {"role": "ffn"}, "what": {**_PARALLEL, "width": 32}},
    ],
    train={"lr": 2e-3},
    note="Smaller than the paper's (prefix 30, width 512), and with prefix tables that train directly.",
)
