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
method(
    "prefix-tuning",
    "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
    2021,
    "https://arxiv.org/abs/2101.00190",
    parts=[{"where": {"role": "attention"}, "what": {"kind": "prefix", "length": 20}}],
    train={"lr": 0.03},
    note="The tables train directly, without the paper's perceptron.",
)
