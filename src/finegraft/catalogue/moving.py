"""Methods whose selection moves while they train."""

from finegraft.catalogue.rows import LINEAR, method


def _entries(where, **select):
    return [{"where": where, "what": {"kind": "sparse"}, "select": {"unit": "entry", **select}}]


method(
    "lift",
    "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused SFT",
    2025,
    "https://arxiv.org/abs/2506.00772",
    parts=_entries(LINEAR, score="low-rank-magnitude", density=0.012),
    control=[{"kind": "reselect", "times": 10}],
    train={"lr": 5e-3},
    note="Chosen again ten times in a run; the paper's intervals of 10 to 2,000 steps come to about that on its data. "
    "Its budget of like_rank: 32 to 128 is 5% of a large model and most of a small one, hence a density.",
)
method(
    "sara",
    "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
    2024,
    "https://arxiv.org/abs/2409.06633",
    parts=_entries({"role": "!head?"}, score="magnitude", threshold=2e-3, largest=False),
    control=[
        {"kind": "reselect", "at": [0.5], "within": "trained", "moments": "fresh"},
        {"kind": "nuclear-norm", "strength": 5e-4, "larger_than": 8},
    ],
    train={"lr": 1e-2},
    note="Biases stay; decay would pull to the base, the paper's to zero, so there is none. The first step after the "
    "second choice is taken, and weights enter with their sign, unlike in the released code.",
)
method(
    "sft-ag",
    "Scaling Sparse Fine-Tuning to Large Language Models",
    2024,
    "https://arxiv.org/abs/2401.16405",
    parts=_entries(LINEAR, score="random", density=0.01),
    control=[{"kind": "grow-and-prune", "times": 20}],
    train={"lr": 2e-3, "optimizer": "aged-adamw"},
    note="Twenty phases in a run instead of one every 20 to 100 steps. Candidates' gradients take a pass of their own.",
)
method(
    "sft-ma",
    "Scaling Sparse Fine-Tuning to Large Language Models",
    2024,
    "https://arxiv.org/abs/2401.16405",
    parts=_entries(LINEAR, score="random", density=0.01),
    control=[{"kind": "grow-and-prune", "times": 20, "grow": "momenta"}],
    train={"lr": 6e-3, "optimizer": "sm3"},
    note="Twenty phases in a run instead of one every 20 to 100 steps.",
)
method(
    "lt-sft",
    "Composable Sparse Fine-Tuning for Cross-Lingual Transfer",
    2022,
    "https://arxiv.org/abs/2110.07560",
    parts=_entries({"role": ["!head?", "!embed?"]}, score="random", density=0.01),
    control=[{"kind": "lottery", "dense_rate": 0.02}, {"kind": "l1", "strength": 0.1}],
    train={"lr": 5e-3, "schedule": "constant"},
    note="Both phases share the run, and one coefficient of L1; the sparse phase has a higher rate. Biases and "
    "embeddings stay. In a loop that runs no controllers this is the paper's baseline of random masks.",
)
