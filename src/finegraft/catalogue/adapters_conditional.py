"""Adapters beside a base that computes for some tokens only."""

from finegraft.catalogue.rows import method

method(
    "coda",
    "Conditional Adapters: Parameter-efficient Transfer Learning with Fast Inference",
    2023,
    "https://arxiv.org/abs/2304.04947",
    parts=[
        {
            "where": {"role": "block"},
            "what": [
                {"kind": "token-router", "choice": "top-k", "share": 0.5},
                {"kind": "bottleneck", "placement": "parallel", "norm": True, "width": 64},
            ],
        }
    ],
    train={"lr": 1e-3},
    note="Half of the tokens of each sample go through each block, a third or a fifth in the paper (share); attention "
    "is among them. Not for generation: the choice looks at all tokens. Without the paper's second pretraining.",
)
method(
    "dyt",
    "Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation",
    2024,
    "https://arxiv.org/abs/2403.11808",
    parts=[
        {
            "where": {"role": "ffn"},
            "what": [
                {"kind": "token-router", "choice": "threshold", "temperature": 5.0, "front": 1},
                {"kind": "bottleneck", "placement": "parallel", "width": 64, "scale": 0.1, "dropout": 0.1},
            ],
        }
    ],
    control=["token-rate"],
    train={"lr": 1e-3, "weight_decay": 0.01},
    note="Gates start open. Without the paper's distillation from the model with all gates open. In training the base "
    "computes for all tokens.",
)
