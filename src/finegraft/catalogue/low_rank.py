"""Low-rank methods."""

from finegraft.catalogue.rows import LINEAR, method


def _lora(**settings):
    return [{"where": LINEAR, "what": {"kind": "low-rank", **settings}}]


method(
    "lora",
    "LoRA: Low-Rank Adaptation of Large Language Models",
    2021,
    "https://arxiv.org/abs/2106.09685",
    parts=_lora(),
    train={"lr": 1e-3},
    note="On all linear layers; the paper adapts attention only (role=['q', 'v']).",
)
method(
    "rslora",
    "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
    2023,
    "https://arxiv.org/abs/2312.03732",
    parts=_lora(scaling="alpha/sqrt(r)"),
    train={"lr": 5e-4},
)
method(
    "lora+",
    "LoRA+: Efficient Low Rank Adaptation of Large Models",
    2024,
    "https://arxiv.org/abs/2402.12354",
    parts=_lora(),
    train={"lr": 2e-4, "lr_ratios": {"b": 16.0}},
)
method(
    "lora-fa",
    "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
    2023,
    "https://arxiv.org/abs/2308.03303",
    parts=_lora(train_a=False),
    train={"lr": 4e-3},
    note="Trains B alone with the ordinary optimizer; without the gradient correction of the later version.",
)
method(
    "dora",
    "DoRA: Weight-Decomposed Low-Rank Adaptation",
    2024,
    "https://arxiv.org/abs/2402.09353",
    parts=[{"where": LINEAR, "what": [{"kind": "low-rank"}, {"kind": "magnitude"}]}],
    train={"lr": 1e-3},
)
method(
    "pissa",
    "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    2024,
    "https://arxiv.org/abs/2404.02948",
    parts=_lora(init="pissa", alpha=8.0),
    train={"lr": 6e-4},
    note="The base keeps its weights; the start of the factors is subtracted from the change instead.",
)
method(
    "olora",
    "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
    2024,
    "https://arxiv.org/abs/2406.01775",
    parts=_lora(init="olora", alpha=8.0),
    train={"lr": 6e-4},
    note="The base keeps its weights; the start of the factors is subtracted from the change instead.",
)
method(
    "adapterbias",
    "AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in NLP Tasks",
    2022,
    "https://arxiv.org/abs/2205.00305",
    parts=[
        {
            "where": {"role": "down", "type": "linear"},
            "what": {"kind": "low-rank", "rank": 1, "alpha": 1.0, "offset": True},
        }
    ],
    train={"lr": 6e-3},
)
