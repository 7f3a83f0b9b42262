"""The graft: a trained, or to be trained, set of changes on a base model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.deltas.delta import Delta
from finegraft.errors import RecipeError, StoreError
from finegraft.grafting.chain import Chain
from finegraft.grafting.chosen_lines import chosen_lines
from finegraft.grafting.chosen_parts import chosen_parts
from finegraft.grafting.leading_ranks import IN_STATE, resize_to, sizes_in, sizes_of
from finegraft.grafting.rounding import warn_of_rounding
from finegraft.grafting.saving import contents_of, manifest_of
from finegraft.grafting.slot import SELECTION, Slot, check_selection
from finegraft.grafting.stack import Placement, Stack
from finegraft.grafting.tasks import set_task
from finegraft.grafting.writing import restore
from finegraft.locate.find import sites
from finegraft.locate.query import depths_below_head
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
        left_out: sites of which its budget chose no unit when it was made.
    """

    def __init__(self, stack: Stack, recipe: Recipe, *, seed: int, placements: list[Placement]) -> None:
        self._stack, self.recipe, self.seed, self.placements = stack, recipe, seed, placements
        self._enabled, self._scale, self.merged = True, 1.0, False
        self._factors: dict[str, float] = {}
        self._parts: frozenset[int] | None = None
        self.left_out: tuple[str, ...] = ()

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
                if name not in slot.borrowed:
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
        lines = [
            f"{self.recipe.name}: {len(self.placements)} sites ({matched})",
            f"{self.num_trainable:,} numbers train, {self.num_trainable / total:.3%} of the base's {total:,}",
        ]
        lines += chosen_lines(self.placements, self.left_out, self.recipe.parts)
        if self.recipe.control:
            kinds = ", ".join(dict.fromkeys(controller.kind for controller in self.recipe.control))
            lines.append(
                f"controllers ({kinds}) act where training runs them: finegraft tune, GraftTrainer, fg.Control"
            )
        return "\n".join(lines)

    def parameter_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Optimizer groups: the recipe's rates by tensor name and by depth, and its rate for new heads.

        Args:
            lr: instead of the recipe's rate; ratios stay.
        """
        train = self.recipe.train
        groups: dict[str, dict[str, Any]] = {}
        base = train.lr if lr is None else lr
        depths = {} if train.layer_decay is None else depths_below_head(sites(self.model))
        if train.layer_decay is not None and not any(depths.values()):
            raise RecipeError(
                f"layer_decay {train.layer_decay} decays from block to block, and the model has no blocks"
            )
        for key, parameter in self.named_parameters():
            slot, name = self.deltas[key.rpartition("/")[0]], key.rpartition("/")[2]
            head = slot.delta.kind == "replacement"
            depth = 0 if head else depths.get(slot.site, 0)
            rate = (train.head_lr or base) if head else base * train.lr_ratios.get(name, 1.0)
            rate *= (train.layer_decay or 1.0) ** depth
            label = "head" if head else name if name in train.lr_ratios else "change"
            label = f"{label}, {depth} below the head" if depth else label
            group = groups.setdefault(
                label, {"params": [], "lr": rate, "weight_decay": train.weight_decay, "name": label}
            )
            group["params"].append(parameter)
        return list(groups.values())

    def state(self) -> dict[str, Tensor]:
        """Trained tensors, detached, by stable names: all that a checkpoint needs beside the recipe and seed.

        Where units move while a graft trains, it says which train now, and what the settled ones were left at.
        """
        state = {name: p.detach() for name, p in self.named_parameters()}
        for key, slot in self.deltas.items():
            if self._moves(slot):
                state |= {f"{key}/{name}": getattr(slot, name) for name in SELECTION}
            if sizes := self.resized(slot):
                state[f"{key}/{IN_STATE}"] = torch.tensor(list(sizes.values()), dtype=torch.float64)
        return state

    def resized(self, slot: Slot) -> dict[str, Any]:
        """Settings of a change that are not the recipe's, since its ranks were moved or truncated."""
        sizes = sizes_of(slot.delta)
        return sizes if sizes and sizes != sizes_of(self.as_made(slot)) else {}

    def as_made(self, slot: Slot) -> Delta:
        """One of its changes, not a head, as the recipe says it, whatever became of its ranks."""
        part, position = slot.place
        delta: Delta = self.recipe.parts[part].changes[position]
        return delta.at(self.placement_of(slot).site)

    def _moves(self, slot: Slot) -> bool:
        return slot.delta.needs_selection and (slot.moved or bool(self.recipe.control))

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over trained tensors from :meth:`state`, and which units train where these had moved.

        Raises:
            StoreError: names or shapes differ; nothing is changed then.
        """
        resized = sizes_in(state, {slot: self.as_made(slot) for slot in self.all_slots if slot.delta.rank_axes})
        state = {name: tensor for name, tensor in state.items() if name.rpartition("/")[2] != IN_STATE}
        moving = [slot for key, slot in self.deltas.items() if self._moves(slot) or f"{key}/{SELECTION[0]}" in state]
        units = {f"{slot.key}/{name}" for slot in moving for name in SELECTION}
        own = dict(self.named_parameters())
        if units | set(own) != set(state):
            raise StoreError(f"state has other tensors: {sorted((units | set(own)) ^ set(state))[:6]}")
        moved = {f"{slot.key}/values" for slot in moving}
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        for slot, delta in resized.items():
            expected = delta.shapes(self.placement_of(slot).site)
            shapes |= {f"{slot.key}/{name}": expected[name] for name, _ in slot.named_parameters()}
        for name in own:
            if name not in moved and shapes[name] != tuple(state[name].shape):
                raise StoreError(f"{name!r} is {tuple(state[name].shape)} in the state, {shapes[name]} here")
        taken = {slot: {name: state[f"{slot.key}/{name}"] for name in ("values", *SELECTION)} for slot in moving}
        for slot, tensors in taken.items():
            check_selection(slot, self.placement_of(slot).site, tensors)
        for slot, tensors in taken.items():
            self.put(slot, tensors)
        for slot, delta in resized.items():
            resize_to(slot, delta, state)
        for name, parameter in own.items():
            if name not in moved:
                parameter.copy_(state[name])
        for placement in self.placements:
            if not all(written.trains for written in placement.chain.written):  # forward looks at what trains only
                restore(placement.chain, placement.site.module)
                self._stack.arrange([placement])

    def placement_of(self, slot: Slot) -> Placement:
        """Where one of its changes is.

        Raises:
            RecipeError: the change is of another graft.
        """
        for placement in self.placements:
            if any(own is slot for own in placement.slots):
                return placement
        raise RecipeError(f"{slot.key!r} is no change of {self!r}; its changes are in graft.all_slots")

    @torch.no_grad()
    def put(self, slot: Slot, tensors: Mapping[str, Tensor]) -> None:
        """Give a change other units and their values, and let the base's tensors follow.

        Prefer :func:`finegraft.grafting.moving.move`, which checks, and takes an optimizer along.

        Args:
            slot: one of its changes, of a kind that trains chosen units.
            tensors: ``values``, ``index``, ``settled_index``, ``settled_values``.
        """
        placement = self.placement_of(slot)
        restore(placement.chain, placement.site.module)
        try:
            slot.take(tensors)
            site = replace(placement.site, chosen=slot.index.cpu())
            self.placements[self.placements.index(placement)] = replace(placement, site=site)
        finally:
            self._stack.arrange([self.placement_of(slot)])

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
    def task(self) -> Any:
        """The task that it acts for, where its changes differ by task (hyper-networks); settable.

        A name or number from its recipe, or a list or tensor of one for each sample of the batch. At first it is the
        first task. Reading it gives numbers.
        """
        return next((slot.task for slot in self.all_slots if slot.task is not None), None)

    @task.setter
    def task(self, value: Any) -> None:
        self._require_attached()
        self._stack.require_no_route()
        if self.merged:
            raise RecipeError("the graft is merged, for the task it had: call unmerge() before setting another")
        set_task(self.all_slots, value)

    @property
    def parts(self) -> tuple[int, ...]:
        """Numbers of the recipe's parts that are in force, from 0, heads under the number after the last; settable.

        The others act as if they were not there, and are saved all the same.
        """
        known = sorted({slot.place[0] for slot in self.all_slots})
        return tuple(part for part in known if self.has_part(part))

    @parts.setter
    def parts(self, parts: Iterable[int]) -> None:
        known = {slot.place[0] for slot in self.all_slots}
        wanted = chosen_parts(parts, known)
        if self.merged:
            raise RecipeError("the graft is merged: call unmerge() before switching its parts")
        self._become(_parts=None if wanted == known else wanted)

    def has_part(self, part: int) -> bool:
        """Whether a part of the recipe is in force while the graft is enabled."""
        return self._parts is None or part in self._parts

    @property
    def scale(self) -> float:
        """How much of the change acts: 1 as trained, 0 none, -1 its negation. New heads are not scaled. Settable."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RecipeError(f"a scale is a finite number, not {value!r}")
        self._become(_scale=float(value))

    def scale_at(self, site: str) -> float:
        """How much of the change at one site acts; see :meth:`scaled_at`."""
        return self._scale * self._factors.get(site, 1.0)

    @contextmanager
    def scaled_at(self, sites: Iterable[str], factor: float) -> Iterator[None]:
        """Within this block the changes at these sites act at ``factor`` times the scale; new heads are not scaled.

        Raises:
            RecipeError: a name that is no site of the graft's.
        """
        before, named = self._factors, set(sites)
        if strange := sorted(named - {placement.site.name for placement in self.placements}):
            raise RecipeError(f"{self!r} changes nothing at {strange[0]!r}; its sites are in graft.placements")
        self._become(_factors={**before, **{site: before.get(site, 1.0) * factor for site in named}})
        try:
            yield
        finally:
            self._become(_factors=before)

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

        Quantised weights are rounded again; a ``RuntimeWarning`` says what that takes off the changes.

        Raises:
            NotMergeable: a change that is none of a weight, or an unmerged graft beneath; nothing is changed then.
            RecipeError: the graft is disabled or detached.
        """
        self._require_attached()
        if not self._enabled:
            raise RecipeError("the graft is disabled: enable it before merging it")
        if self._parts is not None:
            raise RecipeError("some parts of the graft are out of force: set graft.parts to all of them before merging")
        self._stack.check_mergeable(self)
        self._become(merged=True)
        warn_of_rounding(self.placements)

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
        contents = contents_of(self)
        manifest = manifest_of(self, contents.sites, task=task, metrics=metrics)
        write(path, contents.tensors, manifest, card=card(manifest))
        return Path(path)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, **save: Any) -> str:
        """Save into a temporary folder and upload it; returns the address of the commit."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.save(Path(folder) / "graft", **save)
            return push(path, repo_id, private=private, token=token)
