"""Running a recipe's controllers in a training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from finegraft.control.run import Run
from finegraft.errors import RecipeError, StoreError, TrainingError
from finegraft.grafting import Graft
from finegraft.grafting.moving import set_trainable


class Control:
    """The controllers of a graft's recipe, run at their moments by any training loop.

    ``finegraft tune`` and :class:`~finegraft.train.trainer.GraftTrainer` run them by themselves. In a loop of your own
    call the methods in the order of the example: units move, changes freeze and thaw, and penalties act. A loop that
    calls none of them trains what was chosen at the start, to the end.

    All random choices follow from the seed and the step, so that several processes choose alike, and a resumed training
    as an uninterrupted one. Of several processes each must have the whole model, and not in
    ``DistributedDataParallel``, whose buckets do not follow tensors that change their size: call
    :func:`~finegraft.control.processes.average_gradients` before :meth:`before_update` instead.

    Args:
        graft: what trains.
        optimizer: its optimizer; state moves with the units, and that of frozen changes is dropped.
        total_steps: optimizer steps of the whole training.
        loss: the loss of a batch with gradient, as ``loss(batch)``, for controllers that look at gradients or losses of
            their own.
        seed: of all random choices.

    Raises:
        RecipeError: an optimizer that does not hold what the graft trains, or no whole number of steps.

    Example:
        >>> import torch
        >>> import finegraft as fg
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> graft = fg.graft(model, "lift", count=5)
        >>> optimizer = torch.optim.AdamW(graft.parameter_groups())
        >>> loss_of = lambda batch: model(batch).square().mean()
        >>> control = fg.Control(graft, optimizer, total_steps=3, loss=loss_of)
        >>> for batch in torch.randn(3, 4, 8):
        ...     control.before_step()
        ...     loss = loss_of(batch) + control.penalty()
        ...     loss.backward()
        ...     control.after_backward(batch)
        ...     control.before_update()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     control.after_step()
        >>> control.finish()
    """

    def __init__(
        self,
        graft: Graft,
        optimizer: Optimizer,
        *,
        total_steps: int,
        loss: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        _require_together(graft, optimizer, total_steps)
        self._graft, self._begun = graft, False
        self._runs = [(one, Run(graft, optimizer, total_steps, loss, seed)) for one in graft.recipe.control]

    def before_step(self) -> None:
        """Before the forward passes of a step; before the first of a training, controllers start."""
        for controller, run in self._runs:
            if not self._begun:
                controller.start(run)
        self._begun = True
        for controller, run in self._runs:
            controller.before_step(run)

    def penalty(self) -> Tensor | float:
        """What to add to the loss of every batch, in full precision; 0.0 where no controller has any."""
        total: Tensor | float = 0.0
        with torch.autocast(next(self._graft.parameters()).device.type, enabled=False):
            for controller, run in self._runs:
                own = controller.penalty(run)
                total = total if own is None else total + own
        return total

    def after_backward(self, batch: Any) -> None:
        """After the backward pass of every batch."""
        for controller, run in self._runs:
            controller.after_backward(run, batch)

    def before_update(self) -> None:
        """When the gradients of a step are whole, over its batches and all processes, before they are clipped."""
        for controller, run in self._runs:
            controller.before_update(run)

    def after_step(self) -> None:
        """After the optimizer's step, when gradients are cleared."""
        for _, run in self._runs:
            run.step += 1
        for controller, run in self._runs:
            controller.after_step(run)

    def finish(self) -> None:
        """After the last step."""
        for controller, run in self._runs:
            controller.finish(run)

    def memory(self, kind: str) -> dict[str, Any]:
        """What the first controller of a kind remembers, such as a record to be read when training is over.

        Raises:
            RecipeError: the recipe has no controller of that kind.
        """
        for controller, run in self._runs:
            if controller.kind == kind:
                return run.memory
        kinds = ", ".join(controller.kind for controller, _ in self._runs) or "none"
        raise RecipeError(f"recipe {self._graft.recipe.name!r} has no control {kind!r}; it has {kinds}")

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs beside :meth:`Graft.state` and the optimizer's: tensors by name, and plain data."""
        tensors: dict[str, Tensor] = {}
        memories = []
        for number, (controller, run) in enumerate(self._runs):
            plain = {}
            for name, value in run.memory.items():
                if isinstance(value, Tensor):
                    tensors[f"{number}/{name}"] = value
                else:
                    plain[name] = _plain(value, f"{controller.kind}: memory {name!r}")
            memories.append({"kind": controller.kind, "step": run.step, "memory": plain})
        frozen = [name for name, p in self._graft.named_parameters() if not p.requires_grad]
        return tensors, {"begun": self._begun, "controllers": memories, "frozen": frozen}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave, after the graft's and the optimizer's own states; nothing starts again.

        Raises:
            StoreError: the state is of other controllers, or of another graft; nothing is changed then.
        """
        kinds = [one["kind"] for one in facts["controllers"]]
        own = [controller.kind for controller, _ in self._runs]
        if kinds != own:
            raise StoreError(f"the state is of controllers {kinds}; this recipe has {own}")
        flags = dict(self._graft.named_parameters())
        if strange := sorted(set(facts["frozen"]) - set(flags)):
            raise StoreError(f"the state is of another graft: it freezes {strange[0]!r}, which this one does not have")
        device = next(self._graft.parameters()).device
        self._begun = facts["begun"]
        for (_, run), one in zip(self._runs, facts["controllers"], strict=True):
            run.step = one["step"]
            run.memory.clear()
            run.memory.update(one["memory"])
        for key, tensor in tensors.items():
            number, _, name = key.partition("/")
            self._runs[int(number)][1].memory[name] = tensor.to(device)
        frozen = set(facts["frozen"])
        for key, slot in self._graft.deltas.items():
            names = {name for name, _ in slot.named_parameters() if f"{key}/{name}" in flags}
            for flag in (False, True):
                if turned := [name for name in names if (f"{key}/{name}" not in frozen) is flag]:
                    set_trainable(self._graft, [slot], flag, only=turned)


def _require_together(graft: Graft, optimizer: Optimizer, total_steps: int) -> None:
    if not hasattr(graft, "recipe") or not isinstance(optimizer, Optimizer):
        raise RecipeError(
            f"Control takes a graft and its optimizer, not a {type(graft).__name__} and a {type(optimizer).__name__}"
        )
    if type(total_steps) is not int or total_steps < 1:
        raise RecipeError(f"total_steps is a whole number of at least 1, not {total_steps!r}")
    if not graft.recipe.control:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in graft.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise RecipeError(
            f"the optimizer does not train {len(missing)} tensors of the graft, such as {missing[0]!r}: make it of "
            "graft.parameter_groups()"
        )


def _plain(value: Any, what: str) -> Any:
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise TrainingError(f"{what} is {value!r}; a checkpoint takes tensors, and plain data that JSON gives back")
    return value
