"""Adapters that are pruned before they train, and adapters that end in the base's weights."""

from finegraft.catalogue.rows import method

_SPARSE = (
    "SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters",
    2022,
    "https://arxiv.org/abs/2210.04284",
)
_HOULSBY = {"kind": "bottleneck", "init": "bert", "activation": "gelu"}
_SCORES = "score= takes random, magnitude, grasp, synflow and erdos-renyi as well."

method(
    "sparse-adapter",
    *_SPARSE,
    parts=[{"where": {"role": ["attn", "ffn"]}, "what": {**_HOULSBY, "width": 16}}],
    control=[{"kind": "prune-at-start", "score": "sensitivity", "density": 0.6}],
    train={"lr": 2e-3},
    note=f"Pruned by SNIP on the batches of the first step. {_SCORES}",
)
method(
    "large-sparse-adapter",
    *_SPARSE,
    parts=[{"where": {"role": ["attn", "ffn"]}, "what": {**_HOULSBY, "width": 64}}],
    control=[{"kind": "prune-at-start", "score": "sensitivity", "density": 0.25}],
    train={"lr": 2e-3},
    note=f"Four times as wide as an adapter of 16, of which a quarter stays. {_SCORES}",
)
method(
    "r-adapter",
    "Efficient and Versatile Robust Fine-Tuning of Zero-shot Models",
    2024,
    "https://arxiv.org/abs/2408.05749",
    parts=[
        {
            "where": {"role": ["o?", "down?"], "type": "linear"},
            "what": {"kind": "output-low-rank", "rank": 16, "skip": 0.2},
        }
    ],
    control=["weight-average"],
    train={"lr": 1e-3},
    note="It merges. graft.scale = 0.5 is the paper's re-scaling between the base and what was trained. The loss is "
    "the task's own, not the paper's contrastive one.",
)
