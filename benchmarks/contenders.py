"""What is compared: ways to train one and the same base, each as a step that can be called again and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn

import finegraft as fg
from shapes import Batch, Shape


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: how tables and figures call it.
        library: ``"torch"`` (everything trains), ``"peft"`` or ``"finegraft"``.
        method: what the library calls the way to train.
        settings: keywords of ``peft.LoraConfig``, or overrides of ``finegraft.grafting``.
        same_as: the contender that must train just as many numbers, else the comparison is off.
    """

    name: str
    library: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    same_as: str | None = None

    def attach(self, base: nn.Module, shape: Shape) -> nn.Module:
        """The base made trainable this way, in training mode."""
        if self.library == "torch":
            model = base.requires_grad_(True)
        elif self.library == "peft":
            model = _with_peft(base, shape, **self.settings)
        else:
            fg.graft(base, self.method, **self.settings)
            model = base
        return model.train()


def _with_peft(base: nn.Module, shape: Shape, *, fp32_adapters: bool = True, **settings: Any) -> nn.Module:
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.endswith(shape.layers)]
    heads = [shape.head] if shape.head else None
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=names, modules_to_save=heads, **settings)
    return peft.get_peft_model(base, config, autocast_adapter_dtype=fp32_adapters)


PEFT_LORA = Contender("PEFT LoRA", "peft", "lora")
TWIN = Contender("PEFT LoRA, again", "peft", "lora")
CONTENDERS = (
    Contender("full fine-tuning", "torch", "full"),
    PEFT_LORA,
    Contender("lora", "finegraft", "lora", {"rank": 8}, same_as="PEFT LoRA"),
    Contender("lora-fa", "finegraft", "lora-fa", {"rank": 8}),
    Contender("s2ft 1%", "finegraft", "s2ft", {"density": 0.01}),
    Contender("PEFT DoRA", "peft", "lora", {"use_dora": True}),
    Contender("dora", "finegraft", "dora", {"rank": 8}, same_as="PEFT DoRA"),
)
KEPT_ONLY = (
    Contender("PEFT LoRA, bf16 adapters", "peft", "lora", {"fp32_adapters": False}),
    Contender("PEFT LoRA, dropout 0.05", "peft", "lora", {"lora_dropout": 0.05}),
    Contender("lora, dropout 0.05", "finegraft", "lora", {"rank": 8, "dropout": 0.05}),
)
NAMED = {c.name: c for c in (*CONTENDERS, *KEPT_ONLY, TWIN)}


class Training:
    """A base that one contender trains: ``loss()`` is a forward pass, ``step()`` a whole step with AdamW.

    Attributes:
        model: the base with whatever is attached.
        trained: how many numbers train.
    """

    def __init__(self, contender: Contender, shape: Shape, base: nn.Module, batch: Batch) -> None:
        self.model, self._batch = contender.attach(base, shape), batch
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in parameters)
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def loss(self) -> Tensor:
        return self.model(**self._batch).loss

    def step(self) -> None:
        self.loss().backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


Start = Callable[[Contender], Training]


def starter(shape: Shape) -> Start:
    """A function that starts a fresh training on the shape."""
    return lambda contender: Training(contender, shape, shape.build(), shape.batch())
