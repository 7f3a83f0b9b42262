"""Hyper-networks: adapters generated from embeddings of tasks and places by a network that all sites share."""

from finegraft.catalogue.rows import method

_SUBLAYERS = {"role": ["attn", "ffn"]}
_NORMS = {"where": {"type": "norm", "role": "!head?"}, "what": {"kind": "full"}, "optional": True}
_CONDITIONAL = {"kind": "bottleneck", "width": 12, "activation": "gelu", "norm_after": True}
_PLAIN = {"kind": "bottleneck", "width": 12, "activation": "gelu"}
_TASKS = "Say what tasks there are (tasks=) and which a batch is of (graft.task)."

method(
    "hyperformer",
    "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks",
    2021,
    "https://arxiv.org/abs/2106.04489",
    parts=[
        {
            "where": _SUBLAYERS,
            "what": {
                "kind": "hyper",
                "of": _CONDITIONAL,
                "places": ["layer"],
                "heads_per": "position",
                "network_per": "stack",
                "start": "normal",
            },
        },
        _NORMS,
    ],
    train={"lr": 3e-4, "head_lr": 5e-3},
    note=f"{_TASKS} Embeddings are 64 wide, without the projection from 512.",
)
method(
    "hyperformer++",
    "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks",
    2021,
    "https://arxiv.org/abs/2106.04489",
    parts=[{"where": _SUBLAYERS, "what": {"kind": "hyper", "of": _CONDITIONAL, "start": "normal"}}, _NORMS],
    train={"lr": 3e-4, "head_lr": 5e-3},
    note=_TASKS,
)
method(
    "hyper-adapter",
    "Multilingual Machine Translation with Hyper-Adapters",
    2022,
    "https://arxiv.org/abs/2205.10835",
    parts=[
        {
            "where": {"role": "ffn"},
            "what": {
                "kind": "hyper",
                "of": {"kind": "bottleneck", "width": 16, "norm": True},
                "conditions": ["source", "target"],
                "places": ["layer"],
                "skip": True,
                "rescale": True,
            },
        }
    ],
    train={"lr": 1e-3, "head_lr": 5e-3},
    note="A task is a pair of languages, graft.task = (source, target). It starts as the identity, and the network is "
    "smaller than the paper's.",
)
method(
    "pha",
    "Prototype-based HyperAdapter for Sample-Efficient Multi-task Tuning",
    2023,
    "https://arxiv.org/abs/2310.11670",
    parts=[
        {
            "where": {"role": "ffn"},
            "what": {
                "kind": "hyper",
                "of": {"kind": "bottleneck", "width": 16, "placement": "parallel"},
                "places": ["layer"],
                "network_per": "stack",
                "start": "fan-in",
                "init_std": 1e-3,
                "retriever": True,
            },
        }
    ],
    control=[{"kind": "prototypes"}],
    train={"lr": 3e-4, "head_lr": 5e-3},
    note=f"{_TASKS} A task for each sample of a batch lets samples of several tasks be contrasted. The retriever reads "
    "the mean of the last site's outputs, padding included, and the contrast leaves the adapters alone.",
)
method(
    "polyhistor",
    "Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision Tasks",
    2022,
    "https://arxiv.org/abs/2210.03265",
    parts=[
        {
            "where": _SUBLAYERS,
            "what": {"kind": "hyper", "of": _PLAIN, "network_per": "layer", "places": ["position"], "head_rank": 8},
        }
    ],
    train={"lr": 1e-3, "head_lr": 5e-3},
    note=f"{_TASKS} It starts as the identity.",
)
method(
    "polyhistor-lite",
    "Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision Tasks",
    2022,
    "https://arxiv.org/abs/2210.03265",
    parts=[
        {
            "where": _SUBLAYERS,
            "what": {"kind": "hyper", "of": _PLAIN, "places": [], "head_rank": 8, "template": 64},
        }
    ],
    train={"lr": 1e-3, "head_lr": 5e-3},
    note=f"{_TASKS} It starts as the identity. Templates are 64 wide, rather than as wide as the narrowest stage.",
)
method(
    "mip",
    "Magnitude Invariant Parametrizations Improve Hypernetwork Learning",
    2023,
    "https://arxiv.org/abs/2304.07645",
    parts=[
        {
            "where": {"role": "ffn"},
            "what": {
                "kind": "hyper",
                "of": {"kind": "bottleneck", "width": 16},
                "activation": "leaky_relu",
                "norm": False,
                "magnitude_invariant": True,
            },
        }
    ],
    train={"lr": 3e-4, "head_lr": 5e-3},
    note="The parametrisation, on adapters: any hyper-network takes magnitude_invariant=True.",
)
