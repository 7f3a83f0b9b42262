"""Adapters from work on several modalities; a model of one takes them too."""

from finegraft.catalogue.rows import method

_BOTH = {"role": ["attn", "ffn"]}
_FFN = {"role": "ffn"}
_NORMS = {"where": {"type": "norm", "role": "!head?"}, "what": {"kind": "full"}}
_VL_PET = (
    "VL-PET: Vision-and-Language Parameter-Efficient Tuning via Granularity Control",
    2023,
    "https://arxiv.org/abs/2308.09804",
)
_PLACE = "front is the number of the other modality's tokens, which come first."

method(
    "uniadapter",
    "UniAdapter: Unified Parameter-Efficient Transfer Learning for Cross-modal Modeling",
    2023,
    "https://arxiv.org/abs/2302.06605",
    parts=[
        {
            "where": _FFN,
            "what": {
                "kind": "bottleneck",
                "placement": "parallel",
                "norm": True,
                "down": "shared",
                "scale": 0.1,
                "width": 128,
                "dropout": 0.1,
            },
        }
    ],
    train={"lr": 5e-3},
    note="All blocks of all towers share the map down, and each has its own map up; in the paper the blocks of one "
    "depth do, in cross-modal layers with the text's map up added. Towers of other widths need parts of their own.",
)
method(
    "vl-adapter",
    "VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks",
    2022,
    "https://arxiv.org/abs/2112.06825",
    parts=[
        {"where": _BOTH, "what": {"kind": "bottleneck", "init": "houlsby", "activation": "gelu", "width": 32}},
        _NORMS,
    ],
    train={"lr": 1e-3},
    note="The single adapter that all tasks share, the paper's best. A visual projection trains by a part of its own.",
)
method(
    "vl-pet",
    *_VL_PET,
    parts=[
        {
            "where": _BOTH,
            "what": [
                {"kind": "bottleneck", "activation": "gelu", "width": 32},
                {"kind": "feature-gate", "gate": "element", "width": 32},
            ],
        },
        _NORMS,
    ],
    train={"lr": 1e-3},
    note="Of size large, on all stacks: heads of the map down are rows of one map. gate=token, channel and sample are "
    "middleX, middleY and small; start=5 begins near the identity, where the paper's halves the stream.",
)
method(
    "p-adapter",
    "p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models",
    2023,
    "https://arxiv.org/abs/2312.10613",
    parts=[
        {"where": {"role": "attention"}, "what": {"kind": "graph-adapter", "width": 32}},
        {"where": _FFN, "what": {"kind": "bottleneck", "activation": "gelu", "width": 32}},
    ],
    train={"lr": 5e-4},
    note="Messages pass between heads' queries and values before the output projection, in self-attention too; in the "
    "paper after it. The query's own term is the equation's, which the released code leaves out.",
)
method(
    "multiway-adapter",
    "MultiWay-Adapter: Adapting Large-Scale Multi-Modal Models for Scalable Image-Text Retrieval",
    2023,
    "https://arxiv.org/abs/2309.01516",
    parts=[
        {
            "where": _FFN,
            "what": [
                {
                    "kind": "bottleneck",
                    "placement": "parallel",
                    "width": 64,
                    "scale": 0.1,
                    "dropout": 0.1,
                    "front": 1,
                    "tokens": tokens,
                }
                for tokens in ("front", "rest")
            ],
        },
        {
            "where": {"role": "ffn", "layer": "last:1"},
            "what": {"kind": "bottleneck", "activation": "gelu", "width": 256},
        },
    ],
    train={"lr": 1e-3},
    note=f"One adapter for each modality, and a wide one on top for both. {_PLACE}",
)
method(
    "routing-functions",
    "Introducing Routing Functions to Vision-Language Parameter-Efficient Fine-Tuning with Low-Rank Bottlenecks",
    2024,
    "https://arxiv.org/abs/2403.09377",
    parts=[
        {
            "where": {"role": ["q?", "v?", "qkv?"], "type": "linear"},
            "what": {
                "kind": "bottleneck",
                "placement": "parallel",
                "activation": "identity",
                "width": 16,
                "routing": "product",
                "front": 1,
            },
        }
    ],
    train={"lr": 1e-3},
    note=f"routing=sum, map and attention are the paper's other functions. {_PLACE}",
)
method(
    "detris",
    "Densely Connected Parameter-Efficient Tuning for Referring Image Segmentation",
    2025,
    "https://arxiv.org/abs/2501.08580",
    parts=[
        {
            "where": {"role": "ffn", "layer": "odd"},
            "what": {
                "kind": "bottleneck",
                "placement": "parallel",
                "width": 32,
                "convolution": "branches",
                "front": 1,
            },
        }
    ],
    train={"lr": 1e-3},
    note="Branches see each other within an adapter, without batch normalisation and cross-attention to text. Give "
    "grid=[rows, columns] for images; front is the number of class and register tokens, which pass by.",
)
