"""Low-rank methods on bases whose weights are quantised (fg.quantise, torchao or bitsandbytes)."""

from finegraft.catalogue.rows import LINEAR, method

_QUANTISE = "Quantise the base first: fg.quantise(model, {}). On a base that is not quantised it is LoRA."


def _low_rank(**settings):
    return [{"where": LINEAR, "what": {"kind": "low-rank", "rank": 16, "alpha": 16.0, **settings}}]


method(
    "qlora",
    "QLoRA: Efficient Finetuning of Quantized LLMs",
    2023,
    "https://arxiv.org/abs/2305.14314",
    parts=_low_rank(dropout=0.05),
    train={"lr": 1e-3},
    note=_QUANTISE.format("'nf4'") + " The paper's rank is 64.",
)
method(
    "modulora",
    "ModuLoRA: Finetuning 2-Bit LLMs on Consumer GPUs by Integrating with Modular Quantizers",
    2023,
    "https://arxiv.org/abs/2309.16119",
    parts=_low_rank(),
    train={"lr": 1e-3},
    note=_QUANTISE.format("to=...") + " Any format will do that has two functions, there and back; register yours by "
    "@quantisers.register(name).",
)
method(
    "loftq",
    "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
    2023,
    "https://arxiv.org/abs/2310.08659",
    parts=_low_rank(init="quantisation-error"),
    train={"lr": 1e-3},
    note=_QUANTISE.format("'nf4', rank=16, start='codes', steps=5"),
)
method(
    "lq-lora",
    "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
    2023,
    "https://arxiv.org/abs/2311.12023",
    parts=_low_rank(init="quantisation-error"),
    train={"lr": 1e-3},
    note=_QUANTISE.format("bits=2.75, rank=16, calibration=batches") + " The paper's rank is 64.",
)
