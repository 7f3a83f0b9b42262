"""Exact counts of what a forward pass keeps for backward: no clocks, no allocators, no noise.

A step on ``n`` tokens needs weights, gradients, optimizer state, and what the forward pass keeps until backward has
used it. These functions count that last part in bytes, against the least that physics allows (:func:`floor_bytes`).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finegraft.errors import SiteError

Run = Callable[[], Any]


@dataclass(frozen=True)
class SavedBytes:
    """What one forward pass leaves behind for its backward pass.

    Attributes:
        total: bytes of the distinct storages, in full: a view counts as all that it keeps alive.
        storages: how many distinct storages that is.
        tensors: how many tensors were saved, those that share a storage and those of the model included.
    """

    total: int
    storages: int
    tensors: int

    def __int__(self) -> int:
        return self.total


def saved_bytes(model: nn.Module, run: Run) -> SavedBytes:
    """Bytes that ``run()`` saves for backward through autograd.

    Counted is every distinct storage behind a tensor that a node of the graph holds when ``run`` has returned (its
    result is kept meanwhile), whether a built-in operation or ``ctx.save_for_backward`` of a custom function
    saved it. A storage counts once however many tensors view it, and with all its bytes however few of them
    are viewed. Not counted are storages of the model's parameters and buffers, since they are there anyway; a
    *cast* of a parameter is a storage of its own and counts. Inputs that nodes save (token ids, labels) count.

    Tensors that a custom function stashes elsewhere, such as on ``ctx`` as attributes, never pass the hooks this
    count stands on, and neither does what activation checkpointing keeps. :func:`held_bytes` sees those as well.

    Args:
        model: the model whose parameters and buffers are not counted.
        run: does the forward pass with gradients enabled and returns its result, usually the loss.
    """
    saved: list[tuple[weakref.ref, int, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept = tensor.detach()  # a node that held its own output with its history would never be freed
        storage = kept.untyped_storage()
        saved.append((weakref.ref(kept), storage._cdata, storage.nbytes()))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    gc.collect()
    alive = [(key, size) for tensor, key, size in saved if tensor() is not None]
    del result
    own = _own_storages(model)
    counted = {key: size for key, size in alive if key not in own and size}
    return SavedBytes(total=sum(counted.values()), storages=len(counted), tensors=len(alive))


def held_bytes(model: nn.Module, run: Run) -> SavedBytes:
    """Bytes of all storages that came to be during ``run()`` and are alive after it, whoever holds them.

    Where :func:`saved_bytes` asks autograd, this watches every operation and then looks at what is left while the
    result of ``run`` is kept: the graph, attributes of ``ctx``, checkpoints, caches, and the result itself. It so
    bounds the other count from above, apart from inputs that were there before. Casts of parameters count;
    storages that are the model's parameters and buffers afterwards do not.

    Args:
        model: the model whose parameters and buffers are not counted.
        run: does the forward pass with gradients enabled and returns its result, usually the loss.
    """
    with _StorageWatch() as watch:
        result = run()
    gc.collect()
    own = _own_storages(model)
    alive = {key: size for key, (ref, size) in watch.seen.items() if not ref.expired() and key not in own}
    del result
    return SavedBytes(total=sum(alive.values()), storages=len(alive), tensors=len(alive))


def floor_bytes(model: nn.Module, run: Run, *, entry: nn.Module | None = None) -> SavedBytes:
    """Bytes that any training through the whole depth has to save: those of the gradient's way alone.

    All weights are frozen and the output of ``entry`` asks for a gradient, so that it crosses every layer
    above and nothing is kept for the sake of weights. Call it on the base, before anything is attached: what an
    attached change computes would count. ``requires_grad`` is as before afterwards.

    Args:
        model: the base.
        run: as for :func:`saved_bytes`.
        entry: the module whose output starts to need a gradient; default the model's input embeddings.

    Raises:
        SiteError: the model names no input embeddings and ``entry`` is not given, or ``run`` never calls it.
    """
    entry = _input_embeddings(model) if entry is None else entry
    reached = []

    def ask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        reached.append(True)
        return output.requires_grad_()

    hook = entry.register_forward_hook(ask)
    try:
        with _frozen(model):
            saved = saved_bytes(model, run)
    finally:
        hook.remove()
    if not reached:
        raise SiteError(
            f"floor_bytes: run() never called the entry, {type(entry).__name__}; pass the first module it calls"
        )
    return saved


def _own_storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage()._cdata for group in (model.parameters(), model.buffers()) for t in group}


def _input_embeddings(model: Any) -> nn.Module:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        raise SiteError(
            f"floor_bytes: {type(model).__name__} names no input embeddings; pass entry=<first module>"
        ) from None


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)


class _StorageWatch(TorchDispatchMode):
    """Weak references to the storages of all that operations return.

    A weak reference keeps a storage's identity (not its bytes) from being reused, so keys are never ambiguous.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self.seen:
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return output
