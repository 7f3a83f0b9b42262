"""Methods that train a part of the base's own numbers."""

from finegraft.catalogue.rows import LINEAR, method


def _sparse(unit, score, where=LINEAR, **budget):
    return [{"where": where, "what": {"kind": "sparse"}, "select": {"unit": unit, "score": score, **budget}}]


method(
    "full",
    "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    2018,
    "https://arxiv.org/abs/1810.04805",
    parts=[{"where": {"role": "!head?"}, "what": {"kind": "full"}}],
    train={"lr": 5e-5},
    note="Every number of the base, as the yardstick.",
)
method(
    "hft",
    "HFT: Half Fine-Tuning for Large Language Models",
    2024,
    "https://arxiv.org/abs/2404.18466",
    parts=[
        {
            "where": {"role": ["q?", "k?", "v?", "o?", "qkv?", "up?", "gate?", "down?"], "type": "linear"},
            "what": {"kind": "full"},
            "select": {"unit": "module", "density": 0.5},
        }
    ],
    train={"lr": 2e-4},
    note="One draw of half of the matrices; embeddings and norms stay frozen.",
)
method(
    "s2ft",
    "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
    2024,
    "https://arxiv.org/abs/2412.06289",
    parts=_sparse("column", "random", {"role": ["o?", "down"], "type": ["linear?", "tensor?"]}, density=0.03),
    train={"lr": 3e-3},
    note="Input columns of the attention output and of the FFN's down matrix, in the base's own order.",
)
method(
    "lift",
    "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused SFT",
    2025,
    "https://arxiv.org/abs/2506.00772",
    parts=_sparse("entry", "low-rank-magnitude", density=0.012),
    train={"lr": 2e-3},
    note="Chosen once, before training; the paper chooses again every few hundred steps.",
)
method(
    "magnitude-sparse",
    "Sparse High Rank Adapters",
    2024,
    "https://arxiv.org/abs/2406.13175",
    parts=_sparse("entry", "magnitude", density=0.01),
    train={"lr": 2e-3},
)
method(
    "gradient-sparse",
    "Sparse High Rank Adapters",
    2024,
    "https://arxiv.org/abs/2406.13175",
    parts=_sparse("entry", "gradient", density=0.01),
    train={"lr": 1.5e-3},
    note="Needs calibration batches.",
)
