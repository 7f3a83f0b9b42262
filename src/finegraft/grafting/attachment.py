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
from finegraft.grafting.splitting import Split
from finegraft.grafting.writing import refresh
from finegraft.locate.ops import op_for, plain, tensor_op
from finegraft.locate.site import Site

CHILD = "finegraft"


class Tap:
    """The input of a sublayer, passed from its first module to its last within one forward pass."""

    def __init__(self) -> None:
        self.x: Tensor | None = None

    def take(self) -> Any:
        """The input, forgotten here so that it does not outlive the pass."""
        x, self.x = self.x, None
        return x


class Attachment(nn.Module):
    """Everything that changes one module: chains by name, and taps of sublayers that begin here.

    ``guards`` names grafted layers inside a module that would skip them on PyTorch's fused inference path. ``steady``
    is set on layers with running statistics: they use them and do not update them, since a graft does not carry them.

    Chains: ``layer`` for the module as a function, ``sublayer`` for the sublayer that ends here, ``attention`` for an
    attention call, and bare tensors by their attribute name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.overrides: dict[str, Tensor | None] = {}
        self.taps: dict[str, Tap] = {}
        self.ends: Tap | None = None
        self.guards: set[str] = set()
        self.split: Split | None = None
        self.steady = False
        self.attended = False

    def chain(self, name: str) -> Chain | None:
        """The chain of that name, if there is one."""
        found = self._modules.get(name)
        return found if isinstance(found, Chain) else None

    @property
    def empty(self) -> bool:
        """Whether nothing is left that would need the module's class to be ours."""
        return not (self._modules or self.taps or self.ends or self.guards or self.split or self.steady)

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
        for tap in self.taps.values():
            tap.x = _first(args, kwargs)
        layer, sublayer, attention = self.chain("layer"), self.chain("sublayer"), self.chain("attention")
        self.attended = False
        if layer is not None:
            refresh(*layer.writer(module))
        if layer is None or not layer.acts:
            result = call(*args, **kwargs)
        else:
            result = layer.run(module, _Call(call, args, kwargs), _first(args, kwargs))
        if attention is not None and attention.acts and not self.attended:
            raise SiteError(
                f"a {type(module).__name__} ran without its grafted attention call: another attention function was set "
                "in Transformers' registry after grafting. Set it first, then graft"
            )
        if self.ends is None:
            return result
        x = self.ends.take()
        if sublayer is None or not sublayer.acts:
            return result
        y, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        y = sublayer.run(module, Computed(y), x)
        return y if rest is None else (y, *rest)

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
def _grafted_class(base: Any, read: frozenset[str]) -> Any:
    @wraps(base.forward)  # Transformers reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.finegraft.run(self, super(grafted, self).forward, args, kwargs)

    body = {
        "forward": forward,
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
    take_hold(site.entry).taps[site.name] = end.ends


def untap(site: Site) -> None:
    """Undo :func:`tap` at the first module."""
    if site.entry is not None and (attachment := attachment_of(site.entry)) is not None:
        attachment.taps.pop(site.name, None)
        let_go(site.entry)


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


def take_hold(module: Any, read: frozenset[str] = frozenset()) -> Attachment:
    """Attach to a module, or return what is attached; ``read`` names stored tensors that are read outside forward."""
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
    module.__class__ = _grafted_class(base, have | read)
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
    name = tensor if kind == "tensor" else kind
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
