"""Side networks: small networks beside a stack of blocks, so that training needs no graph of the base."""

from finegraft.catalogue.rows import method

_STACK = {"role": "network"}

method(
    "lst",
    "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning",
    2022,
    "https://arxiv.org/abs/2206.06522",
    parts=[{"where": _STACK, "what": {"kind": "side-network", "init": "magnitude"}}],
    train={"lr": 3e-3},
    note=(
        "What the side network gives is added to the base's last hidden state by a map that starts at zero, and so "
        "starts as the base; the paper's replaces it. Side blocks beside all of the base's (the paper leaves out some: "
        "drop_every=4). With an encoder and a decoder, the decoder alone has a side network."
    ),
)
method(
    "qst",
    "Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized Large Language Models",
    2024,
    "https://arxiv.org/abs/2401.07159",
    parts=[
        {
            "where": _STACK,
            "what": {
                "kind": "side-network",
                "reduction": 16,
                "down": "low-rank",
                "gate": "channel",
                "gate_start": 0.5,
                "temperature": 1.0,
                "mix": "gate",
            },
        }
    ],
    train={"lr": 2e-3},
    note="The base may be quantised or not. At the start 73% of each channel is the base's; mix_start raises that.",
)
method(
    "levi",
    "LEVI: Generalizable Fine-tuning via Layer-wise Ensemble of Different Views",
    2024,
    "https://arxiv.org/abs/2402.04644",
    parts=[{"where": _STACK, "what": {"kind": "side-network", "fusion": "late"}}],
    train={"lr": 3e-3},
    note=(
        "The views of all layers meet before the base's one head, whose loss trains them; the paper gives each a head "
        "and a loss. The small network reads what enters the base's blocks."
    ),
)
method(
    "ecotta",
    "EcoTTA: Memory-Efficient Continual Test-Time Adaptation via Self-Distilled Regularization",
    2023,
    "https://arxiv.org/abs/2303.01904",
    parts=[{"where": {"role": "block"}, "what": "meta-block"}],
    train={"lr": 5e-4},
    note=(
        "Beside transformer blocks, each with a meta network: a linear map in the place of the convolution. This "
        "trains on labels (the warm-up); at test time add the control confident-entropy. The pull of each part to the "
        "frozen one is left out."
    ),
)
