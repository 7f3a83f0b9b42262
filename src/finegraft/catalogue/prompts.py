"""Prompts and prefixes: trained positions in the input and in attention."""

from finegraft.catalogue.rows import method

_INPUT = {"role": "input"}
_ATTENTION = {"role": "attention"}
_DEPT = {"kind": "decomposed-prompt", "length": 8, "rank": 4}

method(
    "prompt-tuning",
    "The Power of Scale for Parameter-Efficient Prompt Tuning",
    2021,
    "https://arxiv.org/abs/2104.08691",
    parts=[{"where": _INPUT, "what": {"kind": "prompt", "length": 20}}],
    train={"lr": 0.1},
    note="Starts at random by default; start: vocabulary, or start: text with tokens:, starts from the base's vectors. "
    "Its positions leave the sequence where the blocks end; a padded sample has its prompt next to its first token.",
)
method(
    "vpt-shallow",
    "Visual Prompt Tuning",
    2022,
    "https://arxiv.org/abs/2203.12119",
    parts=[{"where": _INPUT, "what": {"kind": "prompt", "length": 10}}],
    train={"lr": 0.05},
    note="Behind the class token, in encoders of images and of sound; on text it is prompt tuning.",
)
method(
    "p-tuning",
    "GPT Understands, Too",
    2021,
    "https://arxiv.org/abs/2103.10385",
    parts=[{"where": _INPUT, "what": {"kind": "prompt", "length": 20, "hidden": 128, "init_std": 1.0}}],
    train={"lr": 1e-3},
    note="The prompt goes through a perceptron of two hidden layers while it trains, without the paper's LSTM, and "
    "stands before the text. Files hold the prompt alone.",
)
method(
    "prefix-tuning",
    "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
    2021,
    "https://arxiv.org/abs/2101.00190",
    parts=[{"where": _ATTENTION, "what": {"kind": "prefix", "length": 20}}],
    train={"lr": 0.03},
    note="The tables train directly; hidden: 512 puts the paper's perceptron before them, with a rate of about 1e-3.",
)
method(
    "p-tuning-v2",
    "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks",
    2022,
    "https://arxiv.org/abs/2110.07602",
    parts=[{"where": _ATTENTION, "what": {"kind": "prefix", "length": 16, "init_std": 0.1}}],
    train={"lr": 0.01},
    note="Without dropout on the prefixes; hidden: trains them through a perceptron.",
)
method(
    "llama-adapter",
    "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
    2023,
    "https://arxiv.org/abs/2303.16199",
    parts=[{"where": {**_ATTENTION, "layer": "last:90%"}, "what": {"kind": "adaption-prompt", "length": 10}}],
    train={"lr": 9e-3, "weight_decay": 0.02},
    note="On the higher 90% of blocks (30 of 32 in the paper).",
)
method(
    "gated-attention",
    "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
    2025,
    "https://arxiv.org/abs/2505.06708",
    parts=[{"where": _ATTENTION, "what": {"kind": "attention-gate"}}],
    train={"lr": 3e-3},
    note="As a change of a trained model: twice the sigmoid, with weights that start at zero, is the identity. "
    "per: entry gates every entry of a head.",
)
method(
    "norga",
    "Mixture of Experts Meets Prompt-Based Continual Learning",
    2024,
    "https://arxiv.org/abs/2405.14124",
    parts=[{"where": _ATTENTION, "what": {"kind": "prefix", "length": 20, "residual_gate": True}}],
    train={"lr": 0.01},
    note="The prefixes with their gates, in every block (the paper: in the first five), for one task; alpha and tau "
    "train. For later tasks the paper freezes them and finds the task by a head of its own.",
)
method(
    "dept",
    "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning",
    2024,
    "https://arxiv.org/abs/2309.05173",
    parts=[{"where": _INPUT, "what": _DEPT}],
    train={"lr": 0.1, "lr_ratios": {"a": 0.01, "b": 0.01}},
    note="Smaller than the paper's (40 positions, rank 45 for a prompt of 100 at width 768). Tokens past the first 256 "
    "(places) keep their vectors.",
)
method(
    "ept",
    "Efficient Prompt Tuning by Multi-Space Projection and Prompt Fusion",
    2024,
    "https://arxiv.org/abs/2405.11464",
    parts=[{"where": _INPUT, "what": {**_DEPT, "fusion": True, "spaces": 2}}],
    train={"lr": 0.1, "lr_ratios": {"a": 0.01, "b": 0.01, "down": 0.01, "up": 0.01, "gate": 0.01}},
    note="Shapes of the maps and of their gate are not published; here the maps are of low rank and start at zero.",
)
method(
    "cpt",
    "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods",
    2025,
    "https://arxiv.org/abs/2410.17222",
    parts=[{"where": _INPUT, "what": {"kind": "prompt", "length": 20}}],
    control=[{"kind": "near-start"}],
    train={"lr": 0.01},
    note="Give the examples: start: text, tokens: their ids, length: how many, and types: what each is. Without them "
    "it is a prompt near a random start. The loss on the labels of the examples themselves is left out.",
)
method(
    "apt",
    "Approximated Prompt Tuning for Vision-Language Pre-trained Models",
    2023,
    "https://arxiv.org/abs/2306.16115",
    parts=[{"where": {"role": "attn"}, "what": {"kind": "token-memory", "tokens": 64}}],
    train={"lr": 1e-3},
    note="On attention sublayers; 64 tokens where the paper has 200.",
)
method(
    "pvp",
    "PVP: Pre-trained Visual Parameter-Efficient Tuning",
    2023,
    "https://arxiv.org/abs/2304.13639",
    parts=[{"where": _ATTENTION, "what": {"kind": "prefix", "length": 10}}],
    train={"lr": 0.01},
    note="Train it on a large labelled set, then let a fresh graft start from that file: fg.start_from(graft, path) "
    "takes over everything but heads.",
)
method(
    "panda",
    "PANDA: Prompt Transfer Meets Knowledge Distillation for Efficient Model Adaptation",
    2022,
    "https://arxiv.org/abs/2208.10160",
    parts=[{"where": _ATTENTION, "what": {"kind": "prefix", "length": 20, "init_std": 0.1}}],
    train={"lr": 7e-3},
    note="Start from the file of a source task: fg.start_from(graft, path). The similarity of tasks and the "
    "distillation from the source prompt are left out.",
)
method(
    "meet",
    "Parameter-Efficient Tuning Helps Language Model Alignment",
    2023,
    "https://arxiv.org/abs/2310.00819",
    parts=[{"where": _INPUT, "what": {"kind": "prompt", "length": 4}}],
    train={"lr": 0.1},
    note="Control tokens: one graft for each level of preference, and fg.route gives every sample its own. The second "
    "stage puts a graft of another method on the base beside them.",
)
