"""Running a part of the base on some of its tokens: inputs are gathered before it, its output is put back after it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from finegraft.deltas.delta import Needed
from finegraft.errors import SiteError

_BY_TOKEN = {"position_ids": 1, "position_embeddings": 1, "cache_position": 0}
"""Arguments of blocks with an axis of tokens, by name."""

_MASKS = ("attention_mask", "causal_mask", "src_mask", "position_bias")
"""Arguments of blocks with an axis of queries and one of keys, the last two; or, with two axes, ``(batch, keys)``."""

_MASKS_OF_OTHERS = ("encoder_attention_mask",)
_KEY_MASKS = ("src_key_padding_mask",)
_CACHES = ("past_key_values", "past_key_value", "layer_past")


def arguments_of(block: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a block's forward takes by position."""
    taken = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, one in inspect.signature(block.forward).parameters.items() if one.kind in taken)


def narrowed(
    needed: Needed, args: tuple, kwargs: dict[str, Any], *, block: nn.Module | None = None, names: tuple[str, ...] = ()
) -> tuple[tuple, dict[str, Any]]:
    """The arguments for the needed tokens alone.

    A feed-forward sublayer, which treats tokens one by one, takes them as ``(1, needed, width)``. A block takes as many
    of each sample, with positions and masks that belong to them.

    Args:
        needed: the tokens.
        args: positional arguments, the tokens ``(batch, tokens, width)`` first.
        kwargs: the others.
        block: the module, where it is a whole block.
        names: of its positional arguments.

    Raises:
        SiteError: a block is given keys of earlier tokens, which were of other choices.
    """
    if block is None:
        return _with_first(args, kwargs, lambda x: _gathered(x, needed).unsqueeze(0))
    if needed.dtype == torch.bool:
        raise SiteError("a block takes equally many tokens of each sample: choose them by top-k")
    named = dict(zip(names, args, strict=False))
    _refuse_caches(block, named | kwargs)
    args = (*(_picked(name, value, needed) for name, value in named.items()), *args[len(names) :])
    kwargs = {name: _picked(name, value, needed) for name, value in kwargs.items()}
    return _with_first(args, kwargs, lambda x: _gathered(x, needed).view(len(x), -1, x.shape[-1]))


def _picked(name: str, value: Any, places: Tensor) -> Any:
    """An argument of a block for the tokens at these places, where it is one of tokens."""
    if isinstance(value, tuple) and name in _BY_TOKEN:
        return tuple(_picked(name, one, places) for one in value)
    if not isinstance(value, Tensor):
        return value
    if name in _BY_TOKEN:
        return _along(value, _BY_TOKEN[name], places)
    if name in _MASKS and value.ndim > 2:
        return _along(_along(value, value.ndim - 2, places), value.ndim - 1, places)
    if name in _MASKS_OF_OTHERS and value.ndim > 2:
        return _along(value, value.ndim - 2, places)
    return _along(value, 1, places) if name in (*_MASKS, *_KEY_MASKS) else value


def widened(
    y: Float[Tensor, "some tokens width"], needed: Needed, x: Float[Tensor, "batch all in"]
) -> Float[Tensor, "batch all width"]:
    """The output for all tokens of the input ``x``, zero where it was not needed."""
    flat = y.reshape(-1, y.shape[-1])
    whole = flat.new_zeros(x.shape[0] * x.shape[1], y.shape[-1]).index_copy(0, _rows(needed, x.shape[1]), flat)
    return whole.view(*x.shape[:2], -1)


def _with_first(args: tuple, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> tuple[tuple, dict]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: change(kwargs[first])}


def _gathered(x: Tensor, needed: Needed) -> Tensor:
    return x.flatten(0, 1).index_select(0, _rows(needed, x.shape[1]))


def _rows(needed: Needed, tokens: int) -> Int[Tensor, " needed"]:
    """Places of the needed tokens among those of all samples."""
    if needed.dtype == torch.bool:
        return needed.flatten().nonzero().squeeze(-1)
    return (needed + tokens * torch.arange(len(needed), device=needed.device).unsqueeze(-1)).flatten()


def _along(value: Tensor, axis: int, places: Tensor) -> Tensor:
    """Entries of one axis, each sample's own; other axes before it than that of samples are kept."""
    if axis == 0:
        value, axis = value.unsqueeze(0), 1
    value = value.expand(len(places), *value.shape[1:]) if len(value) == 1 else value
    shape = [1] * value.ndim
    shape[0], shape[axis] = places.shape
    target = list(value.shape)
    target[axis] = places.shape[1]
    return value.gather(axis, places.view(shape).expand(target))


def _refuse_caches(block: nn.Module, arguments: dict[str, Any]) -> None:
    cache = next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)
    if cache is None:
        return
    layer = next((m.layer_idx for m in block.modules() if getattr(m, "layer_idx", None) is not None), 0)
    if not hasattr(cache, "get_seq_length") or cache.get_seq_length(layer):
        raise SiteError(
            "a block that runs on some tokens only cannot go on from a key-value cache, which holds other choices of "
            "tokens: generate with use_cache=False"
        )
