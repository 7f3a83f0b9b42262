"""The graft: a trained, or to be trained, set of changes on a base model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.errors import RecipeError, StoreError
from finegraft.grafting.chain import Chain
from finegraft.grafting.saving import manifest_of
from finegraft.grafting.slot import Slot
from finegraft.grafting.stack import Placement, Stack
from finegraft.recipe import Recipe
from finegraft.store import Fingerprint, card, push, write


class Graft:
    """Changes on a base model. Made by :func:`finegraft.grafting` and :func:`finegraft.load`.

    The trained tensors are parameters of the model, so any training loop reaches them; everything else is frozen until
    the last graft is detached.

    Attributes:
        recipe: what it was made by.
        seed: what its random starts were drawn from.
        report: what the recipe matched, for people.
        placements: where its changes are.
    """

    def __init__(self, stack: Stack, recipe: Recipe, *, seed: int, placements: list[Placement]) -> None:
        self._stack, self.recipe, self.seed, self.placements = stack, recipe, seed, placements
        self._enabled, self._scale, self.merged = True, 1.0, False

    def __repr__(self) -> str:
        state = "merged" if self.merged else "enabled" if self._enabled else "disabled"
        state = state if self in self._stack.grafts else "detached"
        return f"Graft({self.recipe.name!r}, {len(self.placements)} sites, {self.num_trainable:,} trained, {state})"

    @property
    def model(self) -> nn.Module:
        """The model it is on.

        Raises:
            RecipeError: the graft was detached.
        """
        self._require_attached()
        return self._stack.model

    def _require_attached(self) -> None:
        if self not in self._stack.grafts:
            raise RecipeError("this graft was detached; attach a saved one with fg.load(path, model)")

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the untouched base; classification heads do not count."""
        return self._stack.base

    @property
    def all_slots(self) -> list[Slot]:
        """Its changes with their tensors, site by site."""
        return [slot for placement in self.placements for slot in placement.slots]

    def slots_at(self, chain: Chain) -> tuple[Slot, ...]:
        """Its changes in one chain."""
        return next((p.slots for p in self.placements if p.chain is chain), ())

    @property
    def deltas(self) -> dict[str, Slot]:
        """Its changes by ``site/part.position``; each holds its kind as ``.delta`` and its tensors by name."""
        return {slot.key: slot for slot in self.all_slots}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained tensors by ``site/part.position/tensor``."""
        for key, slot in self.deltas.items():
            for name, parameter in slot.named_parameters():
                yield f"{key}/{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trained tensors."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def num_trainable(self) -> int:
        """Numbers that train."""
        return sum(p.numel() for p in self.parameters())

    @property
    def report(self) -> str:
        """What the recipe matched and what trains, as a few lines."""
        roles: dict[str, int] = {}
        for placement in self.placements:
            roles[placement.site.role] = roles.get(placement.site.role, 0) + 1
        own = {id(p) for graft in self._stack.grafts for p in graft.parameters()}
        total = sum(p.numel() for p in self._stack.model.parameters() if id(p) not in own)
        matched = ", ".join(f"{role} {count}" for role, count in roles.items())
        return (
            f"{self.recipe.name}: {len(self.placements)} sites ({matched})\n"
            f"{self.num_trainable:,} numbers train, {self.num_trainable / total:.3%} of the base's {total:,}"
        )

    def parameter_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Optimizer groups: the recipe's rates by tensor name, and its rate for new heads.

        Args:
            lr: instead of the recipe's rate; ratios stay.
        """
        train = self.recipe.train
        groups: dict[str, dict[str, Any]] = {}
        base = train.lr if lr is None else lr
        for key, parameter in self.named_parameters():
            slot, name = self.deltas[key.rpartition("/")[0]], key.rpartition("/")[2]
            head = slot.delta.kind == "replacement"
            rate = (train.head_lr or base) if head else base * train.lr_ratios.get(name, 1.0)
            label = "head" if head else name if name in train.lr_ratios else "change"
            group = groups.setdefault(
                label, {"params": [], "lr": rate, "weight_decay": train.weight_decay, "name": label}
            )
            group["params"].append(parameter)
        return list(groups.values())

    def state(self) -> dict[str, Tensor]:
        """Trained tensors, detached, by stable names: all that a checkpoint needs beside the recipe and seed."""
        return {name: p.detach() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over trained tensors from :meth:`state`.

        Raises:
            StoreError: names or shapes differ; nothing is changed then.
        """
        own = dict(self.named_parameters())
        if set(own) != set(state):
            raise StoreError(f"state has other tensors: {sorted(set(own) ^ set(state))[:6]}")
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise StoreError(f"{name!r} is {tuple(state[name].shape)} in the state, {tuple(parameter.shape)} here")
        for name, parameter in own.items():
            parameter.copy_(state[name])

    @property
    def enabled(self) -> bool:
        """Whether it is in force; settable."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if self.merged and not value:
            raise RecipeError("the graft is merged: call unmerge() before disabling it")
        self._become(_enabled=bool(value))

    @property
    def scale(self) -> float:
        """How much of the change acts: 1 as trained, 0 none, -1 its negation. New heads are not scaled. Settable."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RecipeError(f"a scale is a finite number, not {value!r}")
        self._become(_scale=float(value))

    def _become(self, **state: Any) -> None:
        """Take on another state, or keep the present one where that fails halfway."""
        self._require_attached()
        self._stack.require_no_route()
        before = {name: getattr(self, name) for name in state}
        self.__dict__.update(state)
        try:
            self._stack.arrange(self.placements)
        except BaseException:
            self.__dict__.update(before)
            self._stack.arrange(self.placements)
            raise

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this block the graft is not in force."""
        before = self._enabled
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = before

    def merge(self) -> None:
        """Write the changes into the base's tensors; forward then costs what the base costs. Originals are kept.

        Raises:
            NotMergeable: a change that is none of a weight, or an unmerged graft beneath; nothing is changed then.
            RecipeError: the graft is disabled or detached.
        """
        self._require_attached()
        if not self._enabled:
            raise RecipeError("the graft is disabled: enable it before merging it")
        self._stack.check_mergeable(self)
        self._become(merged=True)

    def unmerge(self) -> None:
        """Take the changes out of the base's tensors again; the base is as before, bit for bit."""
        self._become(merged=False)

    def detach(self) -> None:
        """Take the graft off. When the last one goes, the base is what it was: tensors, classes, flags."""
        self._require_attached()
        self._stack.require_no_route()
        self._stack.remove(self)
        self.merged = False

    def save(
        self, path: str | Path, *, task: Mapping[str, Any] | None = None, metrics: Mapping[str, Any] | None = None
    ) -> Path:
        """Save as a folder of ``graft.safetensors``, ``graft.json`` and a model card, atomically.

        Args:
            path: folder; an older graft there is replaced once the new one is whole.
            task: what the graft was trained for, JSON data.
            metrics: measured results by name.
        """
        tensors = {f"{key}/{name}": t.detach() for key, slot in self.deltas.items() for name, t in slot.tensors()}
        manifest = manifest_of(self, task=task, metrics=metrics)
        write(path, tensors, manifest, card=card(manifest))
        return Path(path)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, **save: Any) -> str:
        """Save into a temporary folder and upload it; returns the address of the commit."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.save(Path(folder) / "graft", **save)
            return push(path, repo_id, private=private, token=token)
