"""Prompts: positions that enter a stack of blocks with the sequence, and leave it behind again.

A prompt stands directly before the first token that the mask leaves in, so that a padded sample computes what it would
without padding, and behind the class tokens of an image. Where blocks end its positions are taken out, so pooling,
heads, labels and losses know nothing of it; only a decoder reads what an encoder made of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.cache_utils import StaticLayer

from finegraft.deltas.delta import Entering
from finegraft.errors import SiteError
from finegraft.grafting.chain import Chain, Group
from finegraft.locate.inputs import Way

_STARTED = "finegraft_positions"
_PASSED = "_finegraft_places"


@dataclass(frozen=True)
class Places:
    """Where a prompt stands in the sequences of a batch.

    Attributes:
        length: its positions; 0 where there is none.
        first: index of the first of them in each sample, or one for all.
    """

    length: int = 0
    first: int | Int[Tensor, " batch"] = 0

    def put(self, x: Tensor, prompt: Tensor) -> Tensor:
        """``x`` ``(batch, n, ...)`` with ``prompt`` ``(batch, length, ...)`` in its places."""
        if isinstance(self.first, int):
            return torch.cat([x[:, : self.first], prompt, x[:, self.first :]], dim=1)
        both = torch.cat([prompt, x], dim=1)
        at, first = torch.arange(both.shape[1], device=x.device), self.first[:, None]
        source = torch.where(at < first, at + self.length, torch.where(at < first + self.length, at - first, at))
        return _taken(both, source)

    def leave(self, y: Tensor) -> Tensor:
        """The sequence without the prompt's positions."""
        if isinstance(self.first, int):
            return torch.cat([y[:, : self.first], y[:, self.first + self.length :]], dim=1)
        at = torch.arange(y.shape[1] - self.length, device=y.device)
        return _taken(y, torch.where(at < self.first[:, None], at, at + self.length))


def _taken(x: Tensor, index: Int[Tensor, "batch positions"]) -> Tensor:
    wide = index.view(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, wide)


class Passage:
    """What the modules along a way have to know of the pass that is running.

    Attributes:
        way: the way.
        places: where the prompt stands in this pass.
        groups: what puts it there, for ways without token ids, innermost first.
        left: whether the prompt's positions were left behind.
        running: whether the stack is on its way through a pass.
    """

    def __init__(self, way: Way) -> None:
        self.way = way
        self.rest()

    def rest(self) -> None:
        """Let the next pass go through without prompts."""
        self.places, self.left = Places(), True
        self.groups: tuple[Group, ...] = ()
        self.running = False

    def _of_pass(self, x: Tensor) -> tuple[Places, tuple[Group, ...]]:
        """What the pass of a block's input puts in: the running one, or that of a checkpoint that runs the block again.

        It is noted on the input, by which such a checkpoint is known.
        """
        if torch.compiler.is_compiling():
            return self.places, self.groups
        if not self.running:
            return x.__dict__.get(_PASSED, (Places(), ()))
        if torch.is_grad_enabled():
            x.__dict__[_PASSED] = (self.places, self.groups)
        return self.places, self.groups

    def __deepcopy__(self, memo: dict[int, Any]) -> Passage:
        twin = memo[id(self)] = Passage(self.way)
        twin.way = copy.deepcopy(self.way, memo)
        return twin

    def run(self, chain: Chain | None, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The output of the module that runs the stack, with the prompts of the chain's changes."""
        self.rest()
        groups = () if chain is None else tuple(group for group in chain.groups if group.scale != 0)
        named = dict(zip(self.way.names, args, strict=False)) | kwargs
        if not groups:
            _require_begun_with(named.get("past_key_values"), 0)
            return call(*args, **kwargs)
        if any(group.scale != 1 for group in groups):
            self._require_scalable()
            named = _uncached(named, self.way.names)
        state = _Text.of(self.way, named) if self.way.table is not None else None
        return self._through(groups, call, named, state, ())

    def _require_scalable(self) -> None:
        if self.way.reader is not None:
            raise SiteError(
                "a prompt before an encoder that a decoder reads is there or not: it has scales 1 and 0 and no other"
            )

    def _through(
        self,
        groups: Sequence[Group],
        call: Callable[..., Any],
        named: dict[str, Any],
        state: _Text | None,
        above: tuple[Group, ...],
    ) -> Any:
        """The function that the groups make of the stack, on what the groups above them made of its input."""
        if not groups:
            return self._text(call, named, state) if state is not None else self._signal(call, named, above)
        *below, group = groups
        inner = self._through(below, call, named, None if state is None else state.entered(group), (group, *above))
        if group.scale == 1:
            return inner
        return _blend(self._through(below, call, named, state, above), inner, group.scale)

    def _text(self, call: Callable[..., Any], named: dict[str, Any], state: _Text) -> Any:
        places, at_end = state.places, self.way.exit is None
        self.places, self.left = places, places.length == 0 or at_end
        result = self._call(call, state.arguments(named, self.way))
        if places.length and at_end and self.way.reader is None:
            result = _with_leading(result, places.leave)
        _remember(result, named.get("past_key_values"), state)
        return result

    def _signal(self, call: Callable[..., Any], named: dict[str, Any], groups: tuple[Group, ...]) -> Any:
        self.places, self.left, self.groups = Places(), len(groups) == 0, groups
        return self._call(call, named)

    def _call(self, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        self.running = True
        try:
            result = call(**named)
        finally:
            self.running = False
        if not self.left:
            raise SiteError(
                "the last block of a stack with a prompt did not run (layer drop): set the model's layerdrop to 0"
            )
        return result

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of the first block, with the prompt."""
        x = args[0] if args else next(iter(kwargs.values()))
        _, groups = self._of_pass(x)
        if not groups:
            return args, kwargs
        if any(_is_mask(value, x) for value in (*args[1:], *kwargs.values())):
            raise SiteError("a prompt before blocks that take a mask of positions is not defined: leave out the mask")
        y, self.places = self._prompted(x, groups)
        self._of_pass(y)
        return ((y, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): y})

    def _prompted(self, x: Tensor, groups: tuple[Group, ...]) -> tuple[Tensor, Places]:
        prompts: list[Tensor] = []
        for slot in (slot for group in reversed(groups) for slot in reversed(group.slots)):
            own, x = slot.delta.enter(slot, Entering(x))
            prompts = prompts if own is None else [own.to(x.dtype).expand(len(x), -1, -1), *prompts]
        places = Places(sum(prompt.shape[1] for prompt in prompts), self.way.leading)
        return (places.put(x, torch.cat(prompts, dim=1)) if prompts else x), places

    def leave(self, args: tuple, kwargs: dict[str, Any], result: Any) -> Any:
        """What the last block gave, without the prompt."""
        places, _ = self._of_pass(args[0] if args else next(iter(kwargs.values())))
        self.left = True
        return _with_leading(result, places.leave) if places.length else result

    def read(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a decoder, whose mask of the encoder's states follows these."""
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is None or states is None or mask.shape[-1] >= states.shape[1]:
            return kwargs
        if mask.ndim != 2:
            raise SiteError("a prompt needs the mask of the encoder's states as (batch, positions)")
        places = Places(states.shape[1] - mask.shape[1], _first_token(mask))
        return {**kwargs, "encoder_attention_mask": places.put(mask, mask.new_ones(len(mask), places.length))}


@dataclass(frozen=True)
class _Text:
    """A sequence of tokens on its way into a stack.

    Attributes:
        x: vectors of the tokens of this pass.
        ids: their ids, where they are given.
        mask: of all tokens so far, cached ones included.
        first: places of the first token of each sample.
        seen: positions in the cache, prompts included; 0 where nothing is cached.
        started: positions of prompts among them.
        prompts: what stands before the tokens, outermost last.
    """

    x: Float[Tensor, "batch n width"]
    ids: Int[Tensor, "batch n"] | None
    mask: Bool[Tensor, "batch total"] | None
    first: int | Int[Tensor, " batch"]
    seen: int
    started: int
    prompts: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, way: Way, named: dict[str, Any]) -> _Text:
        """The sequence as the model was given it."""
        x: Any = named.get("inputs_embeds")
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        if x is None and ids is None:
            raise SiteError("a model with a prompt needs input_ids or inputs_embeds")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise SiteError(
                "a prompt needs the attention mask as (batch, tokens): generate with a dynamic cache, the default"
            )
        x = way.table(ids) if x is None and way.table is not None else x
        cache = named.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        mask = None if mask is None else mask.bool()
        return cls(x, ids, mask, 0 if mask is None else _first_token(mask), seen, getattr(cache, _STARTED, 0))

    @property
    def length(self) -> int:
        """Positions of the prompts in the sequence, those in the cache among them."""
        return sum(prompt.shape[1] for prompt in self.prompts)

    @property
    def places(self) -> Places:
        """Where the prompts stand among the positions of this pass."""
        return Places(0 if self.seen else self.length, self.first)

    def entered(self, group: Group) -> _Text:
        """With what a group of changes makes of it."""
        state = self
        for slot in reversed(group.slots):
            prompt, x = slot.delta.enter(slot, state._entering())
            own = () if prompt is None else (prompt.to(x.dtype).expand(len(x), -1, -1),)
            prompts = (*own, *state.prompts)
            state = _Text(x, self.ids, self.mask, self.first, self.seen, self.started, prompts)
        return state

    def _entering(self) -> Entering:
        n, past = self.x.shape[1], self.seen - self.started if self.seen else 0
        if self.mask is None:
            return Entering(self.x, self.ids, None, torch.arange(past, past + n, device=self.x.device)[None])
        index = (self.mask.cumsum(-1) - 1).clamp(min=0)
        return Entering(self.x, self.ids, self.mask[:, -n:], index[:, -n:])

    def arguments(self, named: dict[str, Any], way: Way) -> dict[str, Any]:
        """The arguments of the module that runs the stack."""
        length = self.length
        _require_begun_with(named.get("past_key_values"), length)
        whole = self.x.shape[1] + self.seen + (0 if self.seen else length)
        if way.positions is not None and whole > way.positions:
            raise SiteError(
                f"{whole - length} tokens and a prompt of {length} are more than the {way.positions} positions that "
                "the model has: shorten one of them"
            )
        _require_room(named.get("past_key_values"), whole)
        given = {name: value for name, value in named.items() if name != "input_ids"}
        given["inputs_embeds"] = self.places.put(self.x, torch.cat(self.prompts, dim=1)) if self._enters else self.x
        if self.mask is not None and length:
            around = Places(length, self.first)
            mask = named["attention_mask"]
            given["attention_mask"] = around.put(mask, mask.new_ones(len(mask), length))
        if named.get("position_ids") is not None and length:
            given["position_ids"] = self._positions(named["position_ids"])
        if named.get("token_type_ids") is not None and self._enters:
            types = named["token_type_ids"]
            given["token_type_ids"] = self.places.put(types, types.new_zeros(len(types), length))
        return given

    @property
    def _enters(self) -> bool:
        return bool(self.prompts) and not self.seen

    def _positions(self, given: Tensor) -> Tensor:
        """Position ids: the prompt counts on from the first token's, and the tokens from there."""
        if given.ndim != 2:
            raise SiteError("a prompt needs position_ids as (batch, tokens)")
        given, length = given.expand(len(self.x), -1), self.length
        if self.seen:
            return given + length
        first = torch.as_tensor(self.first, device=given.device).expand(len(given))[:, None]
        start = given.gather(1, first.clamp(max=given.shape[1] - 1))
        moved = given + length * (torch.arange(given.shape[1], device=given.device) >= first)
        return self.places.put(moved, start + torch.arange(length, device=given.device))


def _require_begun_with(cache: Any, length: int) -> None:
    started = getattr(cache, _STARTED, 0)
    if cache is not None and started != length and int(cache.get_seq_length()):
        raise SiteError(
            f"the cache was begun with {started} positions of prompts, and there are {length} now: begin a new one "
            "whenever grafts are switched"
        )


def _require_room(cache: Any, whole: int) -> None:
    layer = next(iter(getattr(cache, "layers", ())), None)
    if type(layer) is StaticLayer and whole > layer.max_cache_len:
        raise SiteError(
            f"tokens and prompts take {whole} positions, and the static cache has {layer.max_cache_len}: generate with "
            "a dynamic cache, the default, or make it larger"
        )


def _first_token(mask: Tensor) -> Int[Tensor, " batch"]:
    return (mask != 0).int().argmax(dim=-1)


def _uncached(named: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    if named.get("past_key_values") is not None:
        raise SiteError(
            "a prompt at a scale other than 1 runs the stack twice, which one key-value cache cannot hold: generate "
            "with use_cache=False, or set the scale to 1"
        )
    return {**named, "use_cache": False} if "use_cache" in names else named


def _remember(result: Any, cache: Any, state: _Text) -> None:
    """Note in a cache that begins here how many of its positions are prompts."""
    for begun in (cache, getattr(result, "past_key_values", None)):
        if begun is not None and not state.seen:
            setattr(begun, _STARTED, state.length)


def _is_mask(value: Any, x: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == x.shape[1] != x.shape[-1]


def _with_leading(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's result with its first tensor changed."""
    if isinstance(result, Tensor):
        return change(result)
    if isinstance(result, tuple):
        return (change(result[0]), *result[1:])
    name = next(iter(result))
    result[name] = change(result[name])
    return result


def _blend(before: Any, after: Any, scale: float) -> Any:
    """``before + scale * (after - before)`` of every tensor of fractions that both have in one shape."""
    olds, _ = tree_flatten(before)
    news, form = tree_flatten(after)
    if len(olds) != len(news):
        raise SiteError("a prompt at a scale other than 1 needs outputs of one structure with and without it")
    return tree_unflatten([_lerp(a, b, scale) for a, b in zip(olds, news, strict=True)], form)


def _lerp(before: Any, after: Any, scale: float) -> Any:
    tensors = isinstance(before, Tensor) and isinstance(after, Tensor)
    if tensors and before.shape == after.shape and before.is_floating_point():
        return before + scale * (after - before)
    return after
