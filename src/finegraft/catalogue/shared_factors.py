"""Methods whose layers have tensors in common."""

from finegraft.catalogue.rows import LINEAR, method

method(
    "vb-lora",
    "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks",
    2024,
    "https://arxiv.org/abs/2405.15179",
    parts=[{"where": LINEAR, "what": {"kind": "vector-bank"}}],
    train={"lr": 5e-3, "lr_ratios": {"logits_a": 10.0, "logits_b": 10.0}},
    note="As in the paper it does not start as the identity. A file holds what is mixed, not all logits: trained on "
    "from a file, vectors that were not chosen start just below those that were.",
)
method(
    "mos",
    "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
    2024,
    "https://arxiv.org/abs/2410.00938",
    parts=[{"where": LINEAR, "what": {"kind": "shard-pool"}}],
    train={"lr": 3e-3},
    note="Private shards make up whole rows and columns. How the official code draws its indices was not at hand.",
)
method(
    "lotr",
    "LoTR: Low Tensor Rank Weight Adaptation",
    2024,
    "https://arxiv.org/abs/2402.01376",
    parts=[{"where": LINEAR, "what": {"kind": "shared-low-rank"}}],
    train={"lr": 2e-3},
    note="Shared factors start with a deviation of one over the root of their width; the paper takes one.",
)
method(
    "tlora",
    "Mixture of Latent Experts Using Tensor Products",
    2024,
    "https://arxiv.org/abs/2405.16671",
    parts=[{"where": LINEAR, "what": {"kind": "tensor-product"}}],
    train={"lr": 3e-3},
    note="The tensor-product LoRA, without the routing of its terms by task. Its code was not at hand.",
)
method(
    "eigenlorax",
    "EigenLoRAx: Recycling Adapters to Find Principal Subspaces for Resource-Efficient Adaptation and Inference",
    2025,
    "https://arxiv.org/abs/2502.04700",
    parts=[{"where": LINEAR, "what": {"kind": "subspace"}}],
    train={"lr": 4e-3},
    note="Name former grafts (grafts=['a', 'b']); with none the subspace is random. Principal components are not "
    "centred, so that former factors lie in the subspace, and the change starts at zero.",
)
