"""Adapters of few numbers: Kronecker products, experts that end as one, single bits, random features."""

from finegraft.catalogue.rows import method

_BOTH = {"role": ["attn", "ffn"]}
_FFN = {"role": "ffn"}
_NORMS = {"where": {"type": "norm", "role": "!head?"}, "what": {"kind": "full"}}
_COMPACTER = (
    "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
    2021,
    "https://arxiv.org/abs/2106.04647",
)
_PHM = {"kind": "bottleneck", "projection": "kronecker", "init": "houlsby", "activation": "gelu", "width": 24}

method(
    "compacter",
    *_COMPACTER,
    parts=[{"where": _BOTH, "what": _PHM}, _NORMS],
    train={"lr": 3e-3},
)
method(
    "compacter++",
    *_COMPACTER,
    parts=[{"where": _FFN, "what": _PHM}, _NORMS],
    train={"lr": 3e-3},
)
method(
    "phm-adapter",
    *_COMPACTER,
    parts=[{"where": _BOTH, "what": {**_PHM, "projection_rank": 6}}, _NORMS],
    train={"lr": 3e-3},
    note="Blocks of full rank at width 24 with 4 terms; the rules are shared as in compacter.",
)
method(
    "mixphm",
    "MixPHM: Redundancy-Aware Parameter-Efficient Tuning for Low-Resource Visual Question Answering",
    2023,
    "https://arxiv.org/abs/2303.01239",
    parts=[{"where": _FFN, "what": {**_PHM, "projection_rank": 8, "dropout": 0.5, "experts": 4}}],
    train={"lr": 5e-3},
    note="Without the paper's penalties on redundancy and for relevance. Factors of all experts are averaged after "
    "training, not their products.",
)
method(
    "mosa",
    "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning",
    2023,
    "https://arxiv.org/abs/2312.02923",
    parts=[
        {
            "where": _FFN,
            "what": {
                "kind": "bottleneck",
                "placement": "parallel",
                "norm": True,
                "activation": "gelu",
                "dropout": 0.1,
                "scale": 0.1,
                "width": 64,
                "experts": 4,
                "join": "union",
            },
        }
    ],
    control=["two-passes"],
    train={"lr": 1e-3, "weight_decay": 0.01},
    note="Experts own parts of one map, so that their union is there at any time, and costs what one adapter does.",
)
method(
    "bi-adapter",
    "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
    2023,
    "https://arxiv.org/abs/2307.16867",
    parts=[
        {
            "where": _FFN,
            "what": {"kind": "bottleneck", "placement": "parallel", "projection": "binary", "width": 32},
        }
    ],
    train={"lr": 1e-3},
    note="One bit an entry in files. Each map's size trains, where the paper takes it from the moments of the entries.",
)
method(
    "snnk-adapter",
    "Scalable Neural Network Kernels",
    2023,
    "https://arxiv.org/abs/2310.13225",
    parts=[{"where": _BOTH, "what": {"kind": "bottleneck", "down": "frozen", "width": 32}}],
    train={"lr": 2e-3},
    note="Random features of the arc-cosine kernel, which are drawn once, and a trained map of them.",
)
