"""Low-rank methods whose factors start from calibration data."""

from finegraft.catalogue.rows import LINEAR, method

_CORDA = (
    "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient "
    "Fine-tuning",
    2024,
    "https://arxiv.org/abs/2406.05223",
)
_SUBTRACTED = "The base keeps its weights; the start of the factors is subtracted from the change instead."


def _linear(**what):
    return [{"where": LINEAR, "what": what}]


method(
    "corda",
    *_CORDA,
    parts=_linear(kind="low-rank", init="corda-ipm", alpha=8.0),
    train={"lr": 6e-4},
    note=f"Needs calibration batches, 256 samples in the paper, of the task to be learned. {_SUBTRACTED} The "
    "covariance is inverted in double precision, so its damping never has to be raised.",
)
method(
    "corda-kpm",
    *_CORDA,
    parts=_linear(kind="low-rank", init="corda-kpm", alpha=8.0),
    train={"lr": 6e-4},
    note="Needs calibration batches of what the base is to keep, such as questions it answers; the paper takes 256. "
    f"{_SUBTRACTED} Takes a whole singular value decomposition of each weight.",
)
method(
    "lora-ga",
    "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
    2024,
    "https://arxiv.org/abs/2407.05000",
    parts=_linear(kind="low-rank", init="lora-ga", scaling="alpha/sqrt(r)"),
    train={"lr": 1e-3},
    note=f"Needs calibration batches with labels. {_SUBTRACTED} B holds the singular values, as in PEFT; the paper's "
    "is orthonormal.",
)
method(
    "lora-sb",
    "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
    2024,
    "https://arxiv.org/abs/2411.19557",
    parts=_linear(kind="core", factors_from="gradient", step=1e-4),
    train={"lr": 2e-3},
    note="Needs calibration batches with labels, a thousandth of the training data in the paper. A fresh graft is not "
    "the base: it takes the first step, whose size is the setting step. The file holds the frozen factors.",
)
