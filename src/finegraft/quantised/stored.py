"""Reading quantised weights, whoever quantised them: this package, torchao or bitsandbytes."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from finegraft.errors import NotMergeable, SiteError
from finegraft.quantised.tensor import QuantisedTensor


def is_quantised(tensor: Any) -> bool:
    """Whether a weight is kept as codes, so that its numbers can be read and not trained."""
    return isinstance(tensor, QuantisedTensor) or _library(tensor) in ("torchao", "bitsandbytes")


def logical_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the matrix that a weight stands for."""
    state = getattr(tensor, "quant_state", None) if _library(tensor) == "bitsandbytes" else None
    return tuple(tensor.shape if state is None else state.shape)


def dense(tensor: Any, module: Any = None) -> Any:
    """The matrix that a weight stands for, detached; what is not quantised is given back as it is.

    Args:
        tensor: the weight.
        module: that holds it; bitsandbytes' layers for int8 keep the scales once they have run.

    Raises:
        SiteError: scales that are nowhere to be found.
    """
    if isinstance(tensor, QuantisedTensor):
        return tensor.dequantize()
    library = _library(tensor)
    if library == "torchao":
        return tensor.detach().dequantize()
    if library == "bitsandbytes":
        return _dense_of_bitsandbytes(tensor, module)
    return tensor


def telling(tensor: Any) -> Tensor:
    """Numbers by which a weight is known again: those it stands for, or codes whose scales move about."""
    return tensor.data if _library(tensor) == "bitsandbytes" and not hasattr(tensor, "quant_state") else dense(tensor)


def check_writable(tensor: Any, name: str) -> None:
    """Raise :class:`NotMergeable` where a weight is kept in a format that only another library can write."""
    if is_quantised(tensor) and not isinstance(tensor, QuantisedTensor):
        raise NotMergeable(
            f"nothing can be written into {name!r}, whose weight {_library(tensor)} keeps as {type(tensor).__name__}: "
            "make the base dense first (fg.dequantise), or quantise it by fg.quantise"
        )


def _library(tensor: Any) -> str:
    """The library that a tensor's class is from."""
    return str(getattr(type(tensor), "__module__", "")).partition(".")[0]


def _dense_of_bitsandbytes(tensor: Any, module: Any) -> Tensor:
    if tensor.is_floating_point():
        return tensor.data  # its library quantises it when it first moves
    if getattr(tensor, "quant_state", None) is not None:
        functional = importlib.import_module("bitsandbytes.functional")
        made: Tensor = functional.dequantize_4bit(tensor.data, tensor.quant_state)
        return made
    scales = getattr(tensor, "SCB", None)
    scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
    if scales is None:
        raise SiteError(f"a weight of {type(tensor).__name__} has no scales, neither by itself nor in its layer")
    scaled: Tensor = tensor.data.float() * scales.unsqueeze(-1) / 127
    return scaled
