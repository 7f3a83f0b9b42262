"""Masks and gates over frozen weights, random subspaces, and retraining after pruning."""

from finegraft.catalogue.rows import LINEAR, method

_ATTENTION = {"role": ["q?", "k?", "v?", "o?", "qkv?"], "type": "linear"}
_BLOCK = {"role": ["q?", "k?", "v?", "o?", "qkv?", "up?", "gate?", "down?"], "type": "linear"}
_PERP = ("PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, "https://arxiv.org/abs/2312.15230")
_BIASES_AND_NORMS = [
    {"where": {"type": "norm", "role": "!head?"}, "what": "full"},
    {"where": {"type": ["linear?", "conv?"], "role": ["!head?", "!lm_head?", "!router?"]}, "what": "bias"},
]

method(
    "r-amt",
    "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models",
    2023,
    "https://arxiv.org/abs/2307.15049",
    parts=[{"where": _ATTENTION, "what": "mask"}],
    control=[{"kind": "l2", "tensors": "scores"}, {"kind": "gradient-dropout", "tensors": "scores"}],
    train={"lr": 6e-4, "schedule": "cosine"},
    note="Scores are distances from the threshold. The teacher of the gradient dropout is the model without the masks; "
    "a new head, which the paper's zero-shot models do not have, stays as trained so far.",
)
method(
    "finegates",
    "FineGates: LLMs Finetuning with Compression using Stochastic Gates",
    2024,
    "https://arxiv.org/abs/2412.12951",
    parts=[{"where": LINEAR, "what": ["bias", "gate"]}],
    control=["gate-sparsity"],
    train={"lr": 3e-3, "schedule": "constant"},
    note="finegraft merge removes what the gates close, which takes a gate some 1,500 steps at this rate. Layers "
    "without a bias get one that starts at zero; gate=hard-concrete takes the gates of Louizos et al. 2018, "
    "arXiv:1712.01312.",
)
method(
    "dopamine",
    "Dopamine: Brain Modes, Not Brains",
    2026,
    "https://arxiv.org/abs/2602.11726",
    parts=[{"where": {"role": "down", "type": "linear"}, "what": "threshold-gate"}],
    train={"lr": 3e-2},
    note="Made from the abstract alone: per-neuron thresholds and gains, and a smooth gate that can be hardened. The "
    "gate's formula, temperature and start are ours. hard=true hardens it in evaluation.",
)
method(
    "intrinsic-dimension",
    "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
    2020,
    "https://arxiv.org/abs/2012.13255",
    parts=[
        {
            "where": {"role": ["!head?", "!embed?", "!lm_head?", "!router?"]},
            "what": {"kind": "projection", "dimension": 20000, "scaled": True},
        }
    ],
    train={"lr": 3e-2},
    note="The scales of the tensors train on top of the dimension, where the authors' code takes them from it; "
    "embeddings stay as they are. scaled=false leaves the scales out; matrix=dense or sparse are those of Li et al. "
    "2018, arXiv:1804.08838, with columns of norm one at each tensor instead of over all.",
)
method(
    "perp-bias",
    *_PERP,
    parts=_BIASES_AND_NORMS,
    train={"lr": 5e-4},
    note="Biases and norms of a pruned base. Layers without a bias get one that starts at zero.",
)
method(
    "perp-masklora",
    *_PERP,
    parts=[
        {"where": _BLOCK, "what": {"kind": "masked-low-rank", "rank": 8, "alpha": 16.0}},
        *_BIASES_AND_NORMS,
    ],
    train={"lr": 5e-4},
    note="For a pruned base, whose zeros stay zero; with biases and norms, without the low-rank change of a language "
    "model's output layer.",
)
method(
    "perp-scalelora",
    *_PERP,
    parts=[{"where": _BLOCK, "what": {"kind": "scale-low-rank", "rank": 8}}, *_BIASES_AND_NORMS],
    train={"lr": 5e-4},
    note="For a pruned base, whose zeros stay zero; with biases and norms, without the low-rank change of a language "
    "model's output layer. All of the rank starts alike, as in the authors' code, and gets equal gradients.",
)
method(
    "lors",
    "LoRS: Efficient Low-Rank Adaptation for Sparse Large Language Model",
    2025,
    "https://arxiv.org/abs/2501.08582",
    parts=[
        {
            "where": _BLOCK,
            "what": {
                "kind": "masked-low-rank",
                "rank": 8,
                "alpha": 8.0,
                "scaling": "alpha/sqrt(r)",
                "gradient": "straight-through",
            },
        }
    ],
    train={"lr": 5e-4},
    note="For a pruned base, whose zeros stay zero. Factors start as in LoRA; the paper takes them from an estimated "
    "gradient. Their gradients keep the factor s, which the authors' code drops.",
)
method(
    "t-few",
    "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    2022,
    "https://arxiv.org/abs/2205.05638",
    parts=[
        {"where": {"role": ["k?", "v?", "qkv?"], "type": "linear"}, "what": {"kind": "scale-shift"}},
        {"where": {"role": "down", "type": ["linear?", "tensor?"]}, "what": {"kind": "scale-shift", "side": "in"}},
    ],
    train={"lr": 1e-2, "betas": [0.0, 0.999]},
    note="(IA)^3 with the recipe's rate. Its losses of several choices are finegraft.train.choices.choice_loss, for a "
    "loop of your own. Adam without momentum stands for Adafactor, whose steps are relative to a tensor's size: the "
    "paper's vectors start at one, ours are differences that start at zero.",
)
