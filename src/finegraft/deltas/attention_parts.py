"""What an attention module is made of, for changes of attention calls that need more than queries, keys and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from finegraft.errors import SiteError
from finegraft.locate.ops import op_for
from finegraft.locate.roles import role_of
from finegraft.locate.site import Site

_HEAD_WIDTH = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_per_head")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


class Projections(NamedTuple):
    """The layers of an attention module that make its keys and values."""

    key: nn.Module
    value: nn.Module

    @property
    def width(self) -> int:
        """Width of what they take."""
        return int(_matrix(self.key).shape[-1])

    def __call__(self, x: Float[Tensor, "n width"]) -> tuple[Tensor, Tensor]:
        """Keys and values ``(n, heads * width)`` of vectors, by the base's own weights."""
        return _linear(self.key, x), _linear(self.value, x)


def input_width(site: Site) -> int:
    """Width of what an attention module is given for its queries.

    Raises:
        SiteError: no layer of it makes queries.
    """
    layer = _layers(site.module)
    found = layer.get("q") or layer.get("qkv")
    if found is None:
        raise SiteError(
            f"{site.name!r} needs a layer for queries; there are the layers {', '.join(site.module._modules)}"
        )
    return int(_matrix(found).shape[-1])


def query_width(site: Site) -> int:
    """Width of the queries of an attention call over all heads."""
    return site.fan_out * int(getattr(site.module, "num_key_value_groups", 1))


def projections(module: nn.Module) -> Projections | None:
    """The layers for keys and values of an attention module; None where one layer makes several of them at once."""
    found = _layers(module)
    return Projections(found["k"], found["v"]) if "k" in found and "v" in found else None


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, child in module._modules.items():
        if child is not None and op_for(child) is not None:
            found[role_of(f"attention.{name}", "linear", in_block=True, beside_experts=False)] = child
    return found


def required_projections(site: Site) -> Projections:
    """The same.

    Raises:
        SiteError: there are none.
    """
    found = projections(site.module)
    if found is None:
        layers = ", ".join(site.module._modules)
        raise SiteError(f"{site.name!r} needs a layer for keys and one for values; there are the layers {layers}")
    return found


def query_heads(site: Site) -> int:
    """Heads of the queries of an attention call.

    Raises:
        SiteError: the module does not say.
    """
    module: Any = site.module
    width = next((getattr(module, name) for name in _HEAD_WIDTH if isinstance(getattr(module, name, None), int)), None)
    groups = getattr(module, "num_key_value_groups", 1)
    if width and site.shape and site.fan_out % width == 0 and isinstance(groups, int):
        return site.fan_out // width * groups
    for holder in (module, getattr(module, "config", None)):
        for name in _HEADS:
            if isinstance(getattr(holder, name, None), int):
                return int(getattr(holder, name))
    raise SiteError(f"the number of heads of {site.name!r} could not be worked out; there are the {_HEADS} to say it")


def _matrix(layer: nn.Module) -> Tensor:
    op, weight = op_for(layer), layer._parameters["weight"]
    assert op is not None
    assert weight is not None
    return op.matrix(weight)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    weight = _matrix(layer)
    return F.linear(x.to(weight.dtype), weight, layer._parameters.get("bias"))
