"""Attention calls: Transformers models fetch their attention function from one registry; we stand in between."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finegraft.errors import SiteError
from finegraft.grafting.attachment import attachment_of
from finegraft.grafting.chain import Chain, Group

_PLAIN = ("sdpa", "eager")


class Call:
    """An attention function as changes see it: ``call(query, key, value, mask, **settings)``.

    Attributes:
        function: what computes it.
        module: the base's attention.
        x: what the module was given, ``(batch, queries, width)``.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module, x: Any) -> None:
        self.function, self.module, self.x = function, module, x

    def of(self, function: Callable[..., Any]) -> Call:
        """The same call by another function."""
        return Call(function, self.module, self.x)

    def __call__(self, *tensors: Any, **settings: Any) -> Any:
        return self.function(*tensors, **settings)


def stand_in_between() -> None:
    """Let attention functions of the registry look for changes on the module that calls them."""
    for name in {*ALL_ATTENTION_FUNCTIONS, "eager"}:
        function = ALL_ATTENTION_FUNCTIONS.get(name)
        if not hasattr(function, "finegraft_inside"):
            between = _between(name, function)
            ALL_ATTENTION_FUNCTIONS.register(name, between)
            if ALL_ATTENTION_FUNCTIONS.get(name) is not between:  # somebody set a function of this name over all others
                ALL_ATTENTION_FUNCTIONS[name] = between


def _between(name: str, function: Callable[..., Any] | None) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> Any:
        inner = _own_eager(module) if function is None else function
        attachment = attachment_of(module)
        chain = None if attachment is None else attachment.chain("attention")
        if attachment is None or chain is None or not chain.acts:
            return inner(module, query, key, value, mask, **settings)
        if name not in _PLAIN:
            raise SiteError(
                f"attention implementation {name!r} takes no changes: load the model with attn_implementation='sdpa'"
            )
        attachment.attended = True
        if settings.get("is_causal") is None:
            settings["is_causal"] = getattr(module, "is_causal", True)
        x = attachment.attending
        return _run(chain, Call(partial(inner, module), module, x), (query, key, value, mask), settings)

    attend = wraps(function)(attend) if function is not None else attend
    attend.__dict__["finegraft_inside"] = True
    return attend


def _own_eager(module: nn.Module) -> Callable[..., Any]:
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise SiteError(
        f"{type(module).__name__} has no eager attention function; load the model with attn_implementation='sdpa'"
    )


def _run(chain: Chain, call: Call, tensors: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    if not chain.routes:
        return _through(chain.groups, call)(*tensors, **settings)
    query, weights = tensors[0], None
    y = None
    for rows, groups in chain.routes:
        index = query.new_tensor(rows, dtype=int)
        own = [_rows(t, index, len(query)) for t in tensors]
        own_settings = {**settings, "position_bias": _rows(settings.get("position_bias"), index, len(query))}
        if "position_bias" not in settings:
            del own_settings["position_bias"]
        own_call = Call(call.function, call.module, _rows(call.x, index, len(query)))
        part, _ = _through(groups, own_call)(*own, **own_settings)
        y = part.new_zeros(len(query), *part.shape[1:]) if y is None else y
        y = y.index_copy(0, index, part)
    return y, weights


def _rows(tensor: Any, index: Tensor, samples: int) -> Any:
    return tensor.index_select(0, index) if tensor is not None and tensor.shape[0] == samples else tensor


def _through(groups: tuple[Group, ...], call: Call) -> Call:
    for group in groups:
        inner = call
        for slot in group.slots:
            inner = call.of(partial(slot.delta.attend, slot, inner))
        call = inner if group.scale == 1 else call.of(partial(_scaled, call, inner, group.scale))
    return call


def _scaled(below: Callable[..., Any], above: Callable[..., Any], scale: float, *tensors: Any, **settings: Any) -> Any:
    y, weights = below(*tensors, **settings)
    changed, _ = above(*tensors, **settings)
    return y + scale * (changed - y), weights
