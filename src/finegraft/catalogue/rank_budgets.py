"""Methods that move a budget of ranks while they train, and penalties on low-rank changes."""

from finegraft.catalogue.rows import LINEAR, method


def _linear(*what):
    return [{"where": LINEAR, "what": list(what)}]


method(
    "adalora",
    "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
    2023,
    "https://arxiv.org/abs/2303.10512",
    parts=_linear({"kind": "three-factor", "rank": 12}),
    control=[{"kind": "rank-budget"}, {"kind": "orthonormality"}],
    train={"lr": 3e-3},
    note="Ranks that lost are removed once the budget stands still, so that the last part of training is cheaper and "
    "the file holds the others only. Importances are taken before the step they belong to; in PEFT's example after it.",
)
method(
    "dylora",
    "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation",
    2023,
    "https://arxiv.org/abs/2210.07558",
    parts=_linear({"kind": "low-rank"}),
    control=[{"kind": "nested-ranks"}],
    train={"lr": 1e-3},
    note="fg.truncate gives it at any rank up to its own. Only the last rank that acts in a step "
    "learns, as in the authors' training script (last_only).",
)
method(
    "sorsa",
    "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
    2024,
    "https://arxiv.org/abs/2409.00055",
    parts=_linear({"kind": "triplets"}),
    control=[{"kind": "orthonormality", "strength": 4e-4, "per_rate": True}],
    train={"lr": 1e-3},
    note="The base keeps its weights; the start is subtracted from the change instead.",
)
method(
    "increlora",
    "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
    2023,
    "https://arxiv.org/abs/2308.12043",
    parts=_linear({"kind": "three-factor", "rank": 4}),
    control=[
        {"kind": "rank-growth", "times": 20, "until": 0.6, "ranks": 2, "reserve": 1e-5, "look": 5},
        {"kind": "orthonormality"},
    ],
    train={"lr": 3e-3, "optimizer": "aged-adamw"},
    note="From a mean rank of 4 to 8 in twenty rounds of equal size; the paper goes from 1 to 2, two sites at a time. "
    "Sensitivities are measured every fifth step. New ranks are young for the optimizer instead of having a rate that "
    "warms up, and the last round gives no more than is left.",
)
method(
    "triadaptlora",
    "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
    2025,
    "https://arxiv.org/abs/2501.08008",
    parts=_linear({"kind": "three-factor", "rank": 4, "middle": "full"}),
    control=[
        {"kind": "rank-growth", "times": 10, "until": 0.6, "ranks": 4, "score": "increase", "pace": "linear"},
    ],
    train={"lr": 1e-3, "optimizer": "aged-adamw"},
    note="The two triangles train as the one matrix that they add up to: r^2 numbers a site, where the authors' count "
    "has 2 r^2. It starts as the identity; zero, as in their code, would leave it and B without a gradient.",
)
method(
    "aflora",
    "AFLoRA: Adaptive Freezing of Low Rank Adaptation in Parameter Efficient Fine-Tuning of Large Models",
    2024,
    "https://arxiv.org/abs/2403.13269",
    parts=_linear({"kind": "random-basis", "rank": 4, "frozen": False}),
    control=[{"kind": "freeze-by-score"}],
    train={"lr": 5e-3},
    note="Factors freeze by the size of their gradients only, as in the paper. The first and the last frozen share of "
    "the training are 5% and 70%, those of its CoLA script.",
)
method(
    "pego",
    "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain "
    "Generalization",
    2024,
    "https://arxiv.org/abs/2407.15085",
    parts=[
        {
            "where": {"type": "linear", "role": ["q?", "v?", "qkv?"]},
            "what": [{"kind": "low-rank", "rank": 4, "alpha": 4.0}] * 4,
        }
    ],
    control=[{"kind": "overlap"}],
    train={"lr": 5e-4},
    note="Where query, key and value are one matrix, that whole matrix changes; the paper's are two of its parts.",
)
method(
    "ba-lora",
    "Bias-Aware Low-Rank Adaptation: Mitigating Catastrophic Inheritance of Large Language Models",
    2024,
    "https://arxiv.org/abs/2408.04556",
    parts=_linear({"kind": "low-rank", "alpha": 8.0, "init": "pissa"}),
    control=[{"kind": "output-penalty"}],
    train={"lr": 1e-3},
    note="Penalties are taken from passes of their own, and of a head that is new from its present state. The share of "
    "the first singular values is of the whole spectrum; the official code takes rows of a vector.",
)
method(
    "gs-lora",
    "Continual Forgetting for Pre-trained Vision Models",
    2024,
    "https://arxiv.org/abs/2403.11530",
    parts=[{"where": {"type": "linear", "role": ["up?", "gate?", "down?"]}, "what": {"kind": "low-rank"}}],
    control=[{"kind": "group-lasso"}],
    train={"lr": 1e-3},
    note="The structure and the group sparsity; the loss that forgets, bounded at BND, is the task's own. Groups that "
    "came near zero are removed if drop_below says how near.",
)
method(
    "allora",
    "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
    2024,
    "https://arxiv.org/abs/2410.09692",
    parts=_linear({"kind": "low-rank", "alpha": 8.0}),
    control=[{"kind": "row-rates"}],
    train={"lr": 1e-3},
    note="Without scaling (alpha is the rank) and dropout. The factor is on AdamW's update; on the gradient (of: "
    "gradient), as in code of others, AdamW would undo it.",
)
