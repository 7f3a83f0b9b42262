"""The interface of what acts on a graft while it trains."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from finegraft.control.run import Run
from finegraft.recipe import Spec


class Controller(Spec):
    """Acts at set moments of training; settings only, what it must remember is in ``run.memory``.

    Attributes:
        kind: the name in recipes; set by the class.
        alternatives: fields of which one is given; overriding one of them in a recipe leaves out the others.
        freezes_sites: whether it says, step by step, which sites train; a recipe has one such controller at most.
    """

    kind: ClassVar[str]
    alternatives: ClassVar[tuple[str, ...]] = ()
    freezes_sites: ClassVar[bool] = False

    def start(self, run: Run) -> None:
        """Before the first step; not on resuming."""

    def before_step(self, run: Run) -> None:
        """Before the forward passes of a step; ``run.step`` counts the finished ones."""

    def penalty(self, run: Run) -> Tensor | None:
        """A scalar to add to the loss of every batch, or None."""

    def after_backward(self, run: Run, batch: Any) -> None:
        """After the backward pass of every batch; gradients of the step so far are in ``.grad``."""

    def before_update(self, run: Run) -> None:
        """When the gradients of a step are whole, before they are clipped and used."""

    def after_step(self, run: Run) -> None:
        """After the optimizer; ``run.step`` counts this step. Units may move here."""

    def finish(self, run: Run) -> None:
        """After the last step."""
