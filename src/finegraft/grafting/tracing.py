"""Hidden states of a stack of blocks, gathered block by block for what acts at its end.

Blocks are met where they are called, outside of any activation checkpointing, which would forget and recompute them one
by one. Nothing is detached here: on a frozen base no graph exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.deltas.states import States
from finegraft.errors import SiteError
from finegraft.grafting.chain import Chain, Computed
from finegraft.locate.site import Site

_CACHES = ("past_key_values", "layer_past", "past_key_value")
_OWN = "_finegraft_layers"


class Trace:
    """The states of one pass through a stack.

    Attributes:
        chain: the changes at the end of the stack.
    """

    def __init__(self, site: Site, chain: Chain) -> None:
        self.chain = chain
        self._name, self._blocks, self._causal = site.name, len(site.network.blocks), site.network.causal
        last = getattr(type(site.module), "_finegraft_base", type(site.module))
        self._arguments = tuple(inspect.signature(inspect.unwrap(last.forward)).parameters)[1:]
        self._hidden: list[Tensor] = []

    def before(self, index: int, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep what enters the stack."""
        if index == 0:
            self._hidden = [args[0] if args else next(iter(kwargs.values()))] if self.chain.acts else []

    def after(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> Any:
        """Keep what a block gave; the last one's is changed."""
        if not self.chain.acts:
            return result
        y, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        self._hidden.append(y)
        if index < self._blocks - 1:
            return result
        hidden, self._hidden = tuple(self._hidden), []
        if len(hidden) != self._blocks + 1:
            raise SiteError(
                f"{len(hidden) - 1} of the {self._blocks} blocks of {self._name!r} ran; a side network needs each "
                "once: switch off what skips layers, such as layerdrop"
            )
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        y = self.chain.run(module, Computed(y, self._states(hidden, given)), hidden[0])
        return y if rest is None else (y, *rest)

    def _states(self, hidden: tuple[Tensor, ...], given: Mapping[str, Any]) -> States:
        rotation = given.get("position_embeddings")
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        cache = getattr(cache, "self_attention_cache", cache)
        cached = cache is not None and int(cache.get_seq_length()) > 0
        return States(
            hidden,
            mask=_mask(given),
            bias=_detached(given.get("position_bias")),
            causal=self._causal or given.get("is_causal") is True,
            rotation=rotation if isinstance(rotation, tuple) and len(rotation) == 2 else None,
            memory=_detached(given.get("encoder_hidden_states")),
            memory_mask=_positive(given.get("encoder_attention_mask")),
            extended=partial(_extended, cache) if cached else None,
        )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _mask(given: Mapping[str, Any]) -> Tensor | None:
    """The mask of self-attention, whether Transformers' or that of PyTorch's own layers, where true forbids."""
    if "src_mask" not in given and "src_key_padding_mask" not in given:
        return _positive(given.get("attention_mask"))
    whole, padding = given.get("src_mask"), given.get("src_key_padding_mask")
    masks = [m if m is None or m.is_floating_point() else ~m for m in (whole, padding)]
    found = [m if m.ndim != 2 or m is masks[0] else m[:, None, None, :] for m in masks if m is not None]
    return sum(map(_added, found[1:]), _added(found[0])) if len(found) == 2 else found[0] if found else None


def _added(mask: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, float("-inf"))


def _positive(mask: Any) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise SiteError(
            f"a side network cannot read an attention mask of type {type(mask).__name__}: load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    return mask.bool()[:, None, None, :] if mask.ndim == 2 else mask


def _extended(
    cache: Any, owner: Hashable, index: int, number: int, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens so far: a side network's layers stand behind the base's in the model's own cache.

    So they grow, shrink and change rows with those of the base, whatever generation does.
    """
    starts = cache.__dict__.setdefault(_OWN, {})
    if owner not in starts:
        starts[owner] = len(cache.layers)
        cache.layers.extend(_like(cache.layers[0]) for _ in range(number))
    found: tuple[Tensor, Tensor] = cache.layers[starts[owner] + index].update(keys, values)
    length, expected = int(cache.layers[starts[owner] + index].get_seq_length()), int(cache.get_seq_length())
    if length != expected:
        raise SiteError(
            f"the key-value cache holds {expected} tokens of the base and {length} of a side network: it was begun "
            "without this graft, or passed over it; start with an empty cache"
        )
    return found


def _like(layer: Any) -> Any:
    from transformers.cache_utils import DynamicLayer, StaticLayer

    if type(layer) is DynamicLayer:
        return DynamicLayer()
    if type(layer) is StaticLayer:
        return StaticLayer(max_cache_len=layer.max_cache_len)
    raise SiteError(
        f"a side network cannot keep its keys and values in a cache of {type(layer).__name__}: generate with "
        "use_cache=False"
    )
