"""What is compared: ways to train one and the same base, each as a step that can be called again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

import finegraft as fg
from shapes import Batch, Shape

STEPS = 1000  # that a training is planned for; no more than a few are done
Clock = Callable[[], float]
Sizes = dict[str, tuple[int, int]]
PeftSettings = dict[str, Any] | Callable[[Sizes], dict[str, Any]]


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: how tables and figures call it.
        library: ``"torch"`` (everything trains, or the lowest norm alone), ``"peft"`` or ``"finegraft"``.
        method: what the library calls the way to train (``lora``, ``shira``, or a class of PEFT's configurations), or a
            recipe as data.
        settings: keywords of PEFT's configuration or a function that gives them for the sizes of layers, or overrides
            of ``finegraft.graft``.
        same_as: the contender that must train just as many numbers, else the comparison is off.
    """

    name: str
    library: str
    method: str | dict[str, Any]
    settings: PeftSettings = field(default_factory=dict)
    same_as: str | None = None

    def attach(self, base: nn.Module, shape: Shape) -> nn.Module:
        """The base made trainable this way, in training mode."""
        if self.library == "torch":
            model = base.requires_grad_(self.method == "full")
            _lowest_norm(base).requires_grad_(True)
        elif self.library == "peft":
            settings = self.settings(_sizes(base, shape)) if callable(self.settings) else self.settings
            attach = {"lora": _with_lora, "shira": _with_shira}.get(str(self.method), partial(_with, str(self.method)))
            model = attach(base, shape, **settings)
        else:
            settings = self.settings if isinstance(self.settings, dict) else {}
            fg.graft(base, self.method, calibration=[shape.batch()], **settings)
            model = base
        return model.train()


def _lowest_norm(base: nn.Module) -> nn.Module:
    return next(m for m in base.modules() if type(m).__name__.endswith("Norm"))


def _with_lora(base: nn.Module, shape: Shape, *, fp32_adapters: bool = True, **settings: Any) -> nn.Module:
    config = peft.LoraConfig(r=8, lora_alpha=16, **_whole(base, shape), **settings)
    return peft.get_peft_model(base, config, autocast_adapter_dtype=fp32_adapters)


def _with_shira(base: nn.Module, shape: Shape, **settings: Any) -> nn.Module:
    return peft.get_peft_model(base, peft.ShiraConfig(random_seed=0, **_whole(base, shape), **settings))


def _with(config: str, base: nn.Module, shape: Shape, *, frozen: str | None = None, **settings: Any) -> nn.Module:
    """The base under one of PEFT's configurations; parameters with ``frozen`` in their names do not train."""
    model = peft.get_peft_model(base, getattr(peft, config)(**_whole(base, shape), **settings))
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    return model


def _sizes(base: nn.Module, shape: Shape) -> Sizes:
    """Outputs and inputs of all linear layers by name."""
    names = _whole(base, shape)["target_modules"]
    return {name: tuple(base.get_submodule(name).weight.shape) for name in names}


def _whole(base: nn.Module, shape: Shape) -> dict[str, Any]:
    """All linear layers by name, and the head that trains along."""
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.endswith(shape.layers)]
    return {"target_modules": names, "modules_to_save": [shape.head] if shape.head else None}


def _sparse(unit: str, *, score: str = "magnitude", **budget: Any) -> dict[str, Any]:
    where = {"type": "linear", "role": ["!head?", "!lm_head?"]}
    return {"parts": [{"where": where, "what": "sparse", "select": {"unit": unit, "score": score, **budget}}]}


PEFT_LORA = Contender("PEFT LoRA", "peft", "lora")


def twin_of(contender: Contender) -> Contender:
    """The same once more, whose times show what a run can resolve."""
    return replace(contender, name=f"{contender.name}, again", same_as=None)


TWIN = twin_of(PEFT_LORA)
FULL = Contender("full fine-tuning", "torch", "full")
S2FT = Contender("s2ft 1%", "finegraft", "s2ft", {"density": 0.01})
CONTENDERS = (
    FULL,
    PEFT_LORA,
    Contender("lora", "finegraft", "lora", {"rank": 8}, same_as="PEFT LoRA"),
    Contender("lora-fa", "finegraft", "lora-fa", {"rank": 8}),
    S2FT,
    Contender("PEFT DoRA", "peft", "lora", {"use_dora": True}),
    Contender("dora", "finegraft", "dora", {"rank": 8}, same_as="PEFT DoRA"),
)
KEPT_ONLY = (
    Contender("PEFT LoRA, bf16 adapters", "peft", "lora", {"fp32_adapters": False}),
    Contender("PEFT LoRA, dropout 0.05", "peft", "lora", {"lora_dropout": 0.05}),
    Contender("lora, dropout 0.05", "finegraft", "lora", {"rank": 8, "dropout": 0.05}),
)
PEFT_SHIRA = Contender("PEFT SHiRA", "peft", "shira", {"r": 4})
FROZEN = Contender("frozen base: the lowest norm alone", "torch", "norm")
"""What the gradient's way through the model takes, whatever trains on top."""
SPARSE = (
    FULL,
    FROZEN,
    PEFT_LORA,
    PEFT_SHIRA,
    Contender("entries, as many as SHiRA", "finegraft", _sparse("entry", like_rank=4), same_as=PEFT_SHIRA.name),
    Contender("entries 0.1%", "finegraft", _sparse("entry", density=0.001)),
    Contender("entries 1%", "finegraft", _sparse("entry", density=0.01)),
    Contender("columns 1%", "finegraft", _sparse("column", density=0.01)),
    Contender("rows 1%", "finegraft", _sparse("row", density=0.01)),
    Contender("blocks 1%", "finegraft", _sparse("block", density=0.01)),
    S2FT,
)
DRAWN = Contender("entries 1%, drawn by the seed", "finegraft", _sparse("entry", score="random", density=0.01))
SIDE = tuple(Contender(name, "finegraft", name) for name in ("lst", "qst", "levi"))
NAMED = {c.name: c for c in (*CONTENDERS, *KEPT_ONLY, *SPARSE, *SIDE, DRAWN, TWIN)}


class Training:
    """A base that one contender trains: ``loss()`` is a forward pass, ``step()`` a whole step with AdamW.

    What moves budgets while it trains is a part of the step.

    Attributes:
        model: the base with whatever is attached.
        trained: how many numbers train.
        attach_seconds: what attaching took.
    """

    def __init__(
        self, contender: Contender, shape: Shape, base: nn.Module, batch: Batch, clock: Clock = time.perf_counter
    ) -> None:
        began = clock()
        self.model, self._batch = contender.attach(base, shape), batch
        self.attach_seconds = clock() - began
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in parameters)
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        self._control = self._controllers() if contender.library == "finegraft" else None
        self._done = 0

    def _controllers(self) -> fg.Control | None:
        (graft,) = fg.grafts(self.model)
        loss = lambda batch: self.model(**batch).loss  # noqa: E731
        return fg.Control(graft, self._optimizer, total_steps=STEPS, loss=loss) if graft.recipe.control else None

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return sum(t.nbytes for state in self._optimizer.state.values() for t in state.values() if torch.is_tensor(t))

    def loss(self) -> Tensor:
        return self.model(**self._batch).loss

    def step(self) -> None:
        if self._control is not None:
            self._controlled_step(self._control)
        else:
            self.loss().backward()
            self._optimizer.step()
            if hasattr(self.model, "base_model") and hasattr(self.model.base_model, "update_and_allocate"):
                self.model.base_model.update_and_allocate(self._done)  # PEFT's AdaLoRA
            self._optimizer.zero_grad(set_to_none=True)
        self._done += 1

    def _controlled_step(self, control: fg.Control) -> None:
        control.before_step()
        (self.loss() + control.penalty()).backward()
        control.after_backward(self._batch)
        control.before_update()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        control.after_step()


Start = Callable[[Contender], Training]


def starter(shape: Shape, clock: Clock = time.perf_counter) -> Start:
    """A function that starts a fresh training on the shape."""
    return lambda contender: Training(contender, shape, shape.build(), shape.batch(), clock)
