"""How changes take hold of a module: its class becomes a subclass whose forward runs them.

The base's parameter names, ``isinstance`` and ``copy.deepcopy`` stay as they were, ``torch.compile`` traces through,
and taking hold off again is giving the class back.
"""

from __future__ import annotations

from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from finegraft.errors import SiteError
from finegraft.grafting.chain import Chain, Computed
from finegraft.grafting.entering import Passage
from finegraft.grafting.narrowing import arguments_of, narrowed, widened
from finegraft.grafting.splitting import Split
from finegraft.grafting.tracing import Trace
from finegraft.grafting.writing import refresh
from finegraft.locate.ops import op_for, plain, tensor_op
from finegraft.locate.site import Site

CHILD = "finegraft"


class Tap:
    """The input of a sublayer, passed from its first module to its last within one forward pass."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.needed: Tensor | None = None
        self.end: Attachment | None = None
        self.block: tuple[str, ...] | None = None

    def give(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Keep the input; what the first module is to run on: all of it, or the tokens that are needed."""
        self.x = _first(args, kwargs)
        chain = None if self.end is None else self.end.chain("sublayer")
        self.needed = None if chain is None else chain.needed(self.x)
        if self.needed is None:
            return args, kwargs
        if self.block is None:
            return narrowed(self.needed, args, kwargs)
        return narrowed(self.needed, args, kwargs, block=module, names=self.block)

    def take(self) -> tuple[Any, Tensor | None]:
        """The input and which of its tokens were needed, forgotten here so that they do not outlive the pass."""
        x, needed, self.x, self.needed = self.x, self.needed, None, None
        return x, needed


class Attachment(nn.Module):
    """Everything that changes one module: chains by name, taps of sublayers that begin here, and ways of prompts.

    ``guards`` names grafted layers inside a module that would skip them on PyTorch's fused inference path. ``steady``
    is set on layers with running statistics: they use them and do not update them, since a graft does not carry them.

    Chains: ``layer`` for the module as a function, ``sublayer`` for the sublayer that ends here, ``attention`` for an
    attention call, ``input`` for a stack that this module runs, and bare tensors by their attribute name. ``ways`` says
    of which prompts it is ``entry``, ``exit`` or ``reader`` (:class:`~finegraft.locate.inputs.Way`), ``traces`` in
    which stacks its output counts, and as which block. The chain ``network`` acts where a stack ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.overrides: dict[str, Tensor | None] = {}
        self.taps: dict[str, Tap] = {}
        self.ends: Tap | None = None
        self.passage: Passage | None = None
        self.ways: dict[str, Passage] = {}
        self.traces: dict[str, tuple[Trace, int]] = {}
        self.guards: set[str] = set()
        self.split: Split | None = None
        self.steady = False
        self.attended = False
        self.attending: Tensor | None = None

    def chain(self, name: str) -> Chain | None:
        """The chain of that name, if there is one."""
        found = self._modules.get(name)
        return found if isinstance(found, Chain) else None

    @property
    def empty(self) -> bool:
        """Whether nothing is left that would need the module's class to be ours."""
        passing = self.taps or self.ends or self.ways or self.traces
        return not (self._modules or passing or self.guards or self.split or self.steady)

    def called(self, module: nn.Module, call: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What calling a block gives, for stacks whose states are gathered."""
        for trace, index in self.traces.values():
            trace.before(index, args, kwargs)
        result = call(*args, **kwargs)
        for trace, index in self.traces.values():
            result = trace.after(index, module, args, kwargs, result)
        return result

    def run(self, module: nn.Module, call: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's output with all changes in force."""
        if self.split is not None:
            return self.split.run(partial(self._whole, module, call), args, kwargs)
        return self._whole(module, call, *args, **kwargs)

    def _whole(self, module: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        if self.steady and module.training:
            module.training = False
            try:
                return self._run(module, call, args, kwargs)
            finally:
                module.training = True
        if self.guards and torch.backends.mha.get_fastpath_enabled():
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                return self._run(module, call, args, kwargs)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
        return self._run(module, call, args, kwargs)

    def _run(self, module: nn.Module, call: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.ways:
            return self._changed(module, call, args, kwargs)
        if (reader := self.ways.get("reader")) is not None:
            kwargs = reader.read(kwargs)
        if (entry := self.ways.get("entry")) is not None:
            args, kwargs = entry.enter(args, kwargs)
        result = self._changed(module, call, args, kwargs)
        exit = self.ways.get("exit")
        return result if exit is None else exit.leave(args, kwargs, result)

    def _changed(self, module: nn.Module, call: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.passage is not None:
            call = partial(self.passage.run, self.chain("input"), call)
        for tap in self.taps.values():
            args, kwargs = tap.give(module, args, kwargs)
        layer, sublayer, attention = self.chain("layer"), self.chain("sublayer"), self.chain("attention")
        self.attended = False
        if attention is not None and attention.acts:
            self.attending = _first(args, kwargs)
        if layer is not None:
            refresh(*layer.writer(module))
        if layer is None or not layer.acts:
            result = call(*args, **kwargs)
        else:
            result = layer.run(module, _Call(call, args, kwargs), _first(args, kwargs))
        self.attending = None
        if attention is not None and attention.acts and not self.attended:
            raise SiteError(
                f"a {type(module).__name__} ran without its grafted attention call: another attention function was set "
                "in Transformers' registry after grafting. Set it first, then graft"
            )
        if self.ends is None:
            return result
        x, needed = self.ends.take()
        if sublayer is None or not sublayer.acts:
            return result
        y, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        y = y if needed is None else widened(y, needed, x)
        y = sublayer.run(module, Computed(y), x)
        return y if rest is None else (y, *rest)

    def forward(self, x: Any) -> Any:
        """What it is given: ``nn.Sequential`` runs all of its children, this one last."""
        return x

    def read(self, module: nn.Module, name: str) -> Tensor | None:
        """A stored tensor as the base's code should see it."""
        if name in self.overrides:
            return self.overrides[name]
        chain = self.chain(name)
        if chain is None:
            return module._parameters[name]
        refresh(*chain.writer(module))
        return chain.effective(module)


class _Call:
    """The module's own forward with everything but its first argument fixed."""

    def __init__(self, call: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._call, self._args, self._kwargs = call, args, kwargs

    def __call__(self, x: Tensor) -> Any:
        if self._args:
            return self._call(x, *self._args[1:], **self._kwargs)
        first = next(iter(self._kwargs))
        return self._call(**{**self._kwargs, first: x})


def _first(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _reader(name: str) -> property:
    def read(self: Any) -> Tensor | None:
        attachment = self._modules.get(CHILD)
        return self._parameters[name] if attachment is None else attachment.read(self, name)

    return property(read)


@cache
def _grafted_class(base: Any, read: frozenset[str], traced: bool = False) -> Any:
    @wraps(base.forward)  # Transformers reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.finegraft.run(self, super(grafted, self).forward, args, kwargs)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.finegraft.called(self, super(grafted, self).__call__, args, kwargs)

    body = {
        "forward": forward,
        **({"__call__": called} if traced else {}),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_finegraft_base": base,
    }
    grafted: type[Any] = type(base.__name__, (base,), {**body, **{name: _reader(name) for name in read}})
    return grafted


def attachment_of(module: nn.Module) -> Attachment | None:
    """What is attached to a module, if anything is."""
    found = module._modules.get(CHILD)
    return found if isinstance(found, Attachment) else None


def tap(site: Site) -> None:
    """Pass the input of a sublayer's first module to its last."""
    end = take_hold(site.module)
    end.ends = end.ends or Tap()
    end.ends.end, end.ends.block = end, arguments_of(site.module) if site.type == "block" else None
    take_hold(site.entry).taps[site.name] = end.ends


def untap(site: Site) -> None:
    """Undo :func:`tap` at the first module."""
    if site.entry is not None and (attachment := attachment_of(site.entry)) is not None:
        attachment.taps.pop(site.name, None)
        let_go(site.entry)


_POSTS = ("entry", "exit", "reader")


def open_way(site: Site) -> None:
    """Let the modules along the way of an input site know of each pass."""
    host = take_hold(site.module)
    host.passage = host.passage or Passage(site.input)
    for post in _POSTS:
        if (module := getattr(site.input, post)) is not None:
            take_hold(module).ways[post] = host.passage


def close_way(site: Site) -> None:
    """Undo :func:`open_way`."""
    if (host := attachment_of(site.module)) is not None:
        host.passage = None
    for post in _POSTS:
        module = getattr(site.input, post)
        if module is not None and (attachment := attachment_of(module)) is not None:
            attachment.ways.pop(post, None)
            let_go(module)


def trace(site: Site, chain: Chain) -> None:
    """Gather the states of a stack's blocks for the chain at its end."""
    end = take_hold(site.module, traced=True)
    found = end.traces.get(site.name, (Trace(site, chain), 0))[0]
    for index, block in enumerate(site.network.blocks):
        take_hold(block, traced=True).traces[site.name] = (found, index)


def untrace(site: Site) -> None:
    """Undo :func:`trace`."""
    for block in site.network.blocks:
        if (attachment := attachment_of(block)) is not None:
            attachment.traces.pop(site.name, None)
            let_go(block)


def hold_statistics(model: nn.Module) -> None:
    """Let layers with running statistics, such as batch normalisation, leave these buffers of the base alone."""
    for module in list(model.modules()):
        if getattr(module, "running_mean", None) is not None:
            take_hold(module).steady = True


def release_statistics(model: nn.Module) -> None:
    """Undo :func:`hold_statistics`."""
    for module in list(model.modules()):
        attachment = attachment_of(module)
        if attachment is not None and attachment.steady:
            attachment.steady = False
            let_go(module)


_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def guard(model: nn.Module, name: str) -> None:
    """Keep PyTorch's fused path from passing over the module or tensor of this name."""
    for module in _fused_above(model, name):
        take_hold(module).guards.add(name)


def unguard(model: nn.Module, name: str) -> None:
    """Undo :func:`guard`."""
    for module in _fused_above(model, name):
        if (attachment := attachment_of(module)) is not None:
            attachment.guards.discard(name)
            let_go(module)


def _fused_above(model: nn.Module, name: str) -> list[nn.Module]:
    found: list[nn.Module] = []
    module: nn.Module | None = model
    for part in name.split("."):
        if module is None:
            break
        if isinstance(module, _FUSED):
            found.append(module)
        module = module._modules.get(part)
    return found


def take_hold(module: Any, read: frozenset[str] = frozenset(), *, traced: bool = False) -> Attachment:
    """Attach to a module, or return what is attached.

    Args:
        module: the module.
        read: names of stored tensors that are read outside forward.
        traced: whether to meet its calls, which lie around hooks and checkpointing, and not forward alone.
    """
    attachment = attachment_of(module)
    if attachment is None:
        if hasattr(module, CHILD):
            raise SiteError(
                f"a {type(module).__name__} has an attribute named {CHILD!r}, which grafts need for themselves"
            )
        if "forward" in module.__dict__:
            raise SiteError(
                f"a {type(module).__name__} has a forward of its own set on the instance (as device-map hooks do), "
                "which changes of its class cannot reach: remove the hooks first"
            )
        attachment = Attachment()
        attachment.train(module.training)
        module.add_module(CHILD, attachment)
    current: Any = type(module)
    base = getattr(current, "_finegraft_base", current)
    have = frozenset(n for n, value in vars(current).items() if current is not base and isinstance(value, property))
    traced = traced or (current is not base and "__call__" in vars(current))
    module.__class__ = _grafted_class(base, have | read, traced)
    return attachment


def let_go(module: Any) -> None:
    """Give the module its class back, once nothing is attached to it any more."""
    attachment = attachment_of(module)
    if attachment is not None and attachment.empty:
        del module._modules[CHILD]
        module.__class__ = type(module)._finegraft_base


def chain_at(site: Site, module: Any, tensor: str, owner: tuple[Chain, nn.Module] | None = None) -> Chain:
    """The chain for a site on one of the modules that hold it, made if need be."""
    kind = site.kind if owner is None else "layer" if tensor == "weight" and op_for(module) else "tensor"
    name = tensor if kind == "tensor" else "sublayer" if kind == "block" else kind
    generic = kind == "layer" and not plain(module)
    read = frozenset({tensor} if kind == "tensor" else {"weight", "bias"} & set(module._parameters) if generic else ())
    attachment = take_hold(module, read)
    chain = attachment.chain(name)
    if chain is None:
        op = site.op
        if owner is not None:
            op = tensor_op(module._parameters[tensor]) if kind == "tensor" else op_for(module)
        chain = Chain(tensor or "weight", op, owner)
        chain.train(module.training)
        attachment.add_module(name, chain)
    return chain
