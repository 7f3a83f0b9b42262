"""Methods that are sums and products of kinds, and adapters of other make."""

from finegraft.catalogue.rows import LINEAR, method


def _linear(*what):
    return [{"where": LINEAR, "what": list(what)}]


_NORMS = {"where": {"type": "norm", "role": "!head?"}, "what": {"kind": "full"}, "optional": True}

method(
    "glora",
    "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning",
    2023,
    "https://arxiv.org/abs/2306.07967",
    parts=_linear({"kind": "bias-map"}, {"kind": "low-rank-gain"}, {"kind": "low-rank", "alpha": 8.0}),
    train={"lr": 2e-3},
    note="W * (1 + A) + B and b * (1 + D) + E + W C, with the same configuration at all sites: low-rank A and B, "
    "vectors C, D and E. Without the paper's search over configurations.",
)
method(
    "orthogonal-adaptation",
    "Orthogonal Adaptation for Modular Customization of Diffusion Models",
    2023,
    "https://arxiv.org/abs/2312.02432",
    parts=_linear({"kind": "basis-low-rank"}),
    train={"lr": 4e-3},
    note="Give each concept its number (concept=1, 2 ...); several grafts, each at scale 0.6, are then a merge of "
    "concepts. The shared orthogonal matrix is a cosine transform, shuffled and with random signs.",
)
method(
    "relaxed-recursive",
    "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA",
    2024,
    "https://arxiv.org/abs/2410.20672",
    parts=[{"where": {**LINEAR, "layer": "first:100%"}, "what": {"kind": "tied"}}],
    train={"lr": 1e-4},
    note="Starts from the mean of tied blocks. Norms and embeddings stay as they are, and so does the base, so that "
    "the saving is in the file, not in memory; without distillation and early exits. Grafts beneath it do not act.",
)
method(
    "mtlora",
    "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning",
    2024,
    "https://arxiv.org/abs/2403.20320",
    parts=_linear({"kind": "low-rank"}, {"kind": "low-rank-mixture", "experts": 2, "scale": 4.0}),
    train={"lr": 1e-3},
    note="Name your tasks (experts=['depth', 'edges']) and set graft.task, once or for each sample; at first it is the "
    "first. Without names all count alike. Task-specific changes are at every site; the paper has them in the last "
    "block of each stage.",
)
method(
    "petalface",
    "PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition",
    2024,
    "https://arxiv.org/abs/2412.07771",
    parts=[
        {
            "where": {"role": ["q?", "k?", "v?", "o?", "qkv?"], "type": "linear"},
            "what": {"kind": "low-rank-mixture", "experts": 2},
        }
    ],
    train={"lr": 4e-3},
    note="fg.weigh(graft, weights) gives each image its weights, 1 - a and a of its quality; until then both are 0.5.",
)
method(
    "hyperdomain",
    "HyperDomainNet: Universal Domain Adaptation for Generative Adversarial Networks",
    2022,
    "https://arxiv.org/abs/2210.08884",
    parts=[{"where": LINEAR, "what": {"kind": "scale-shift", "side": "in"}}],
    train={"lr": 1e-2},
    note="The domain modulation, a factor for each input channel, on linear layers; type='conv' puts it on "
    "convolutions, as in the paper. Without the network that makes it of a description, and its losses.",
)
method(
    "pixelated-butterfly",
    "Pixelated Butterfly: Simple and Efficient Sparse Training for Neural Network Models",
    2021,
    "https://arxiv.org/abs/2112.00029",
    parts=_linear({"kind": "flat-butterfly"}, {"kind": "low-rank"}),
    train={"lr": 1e-3},
    note="Sparse and low-rank parts are added to the weight, each with weight one; the paper trains them, and how much "
    "each counts, in place of it.",
)
method(
    "snnk",
    "Scalable Neural Network Kernels",
    2023,
    "https://arxiv.org/abs/2310.13225",
    parts=[{"where": {"role": ["attn", "ffn"]}, "what": {"kind": "random-features"}}],
    train={"lr": 3e-3},
    note="The adapter of random features of degree one, with a gate that starts at zero.",
)
method(
    "loretta-adp",
    "LoRETTA: Low-Rank Economic Tensor-Train Adaptation for Ultra-Low-Parameter Fine-Tuning of Large Language Models",
    2024,
    "https://arxiv.org/abs/2402.11417",
    parts=[
        {
            "where": {"role": ["attn", "ffn"]},
            "what": {"kind": "bottleneck", "width": 64, "projection": "tensor-train", "projection_rank": 5},
        },
        _NORMS,
    ],
    train={"lr": 2e-3},
    note="The second projection starts at zero, in its first tensor; the official code does not start as the base.",
)
