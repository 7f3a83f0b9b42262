"""Integers and booleans in as few bytes as they need, and back bit for bit.

Three encodings, chosen per tensor by size:

- ``bits``: a bool tensor, 8 entries to the byte.
- ``narrow``: an integer tensor in the smallest integer type that holds its values.
- ``gaps``: a sorted 1-D integer tensor as the differences between neighbours. The largest number of the
  storage type stands for "that much, and the gap goes on", so that a few wide gaps do not widen the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int, Int64, Shaped, UInt8
from torch import Tensor

from finegraft.errors import StoreError
from finegraft.store.strict_json import parse

WIDE = {"int16": torch.int16, "int32": torch.int32, "int64": torch.int64}  # types worth narrowing
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32)
NARROW = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32)
MAX_INT64 = torch.iinfo(torch.int64).max

Encoding = list[Any]  # its name, then what decoding needs; JSON


def pack(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Encode what gets smaller by it.

    Args:
        tensors: contiguous tensors on the CPU.

    Returns:
        The tensors to store, by the same names, and a JSON text for `unpack` that says how each was encoded.
    """
    stored, encodings = {}, {}
    for name, tensor in tensors.items():
        stored[name], encoding = _packed(tensor)
        if encoding is not None:
            encodings[name] = encoding
    return stored, json.dumps(encodings, separators=(",", ":"))


def unpack(stored: dict[str, Tensor], encodings: str) -> dict[str, Tensor]:
    """Undo `pack`.

    Raises:
        StoreError: encodings that are not of `pack`'s making or do not fit the tensors.
    """
    try:
        described = parse(encodings.encode())
    except ValueError as error:
        raise StoreError(f"the tensors' packing is not described in JSON: {error}") from error
    if not isinstance(described, dict) or not described.keys() <= stored.keys():
        raise StoreError("the packing of the tensors is described for tensors that are not there")
    return {
        name: _unpacked(name, tensor, described[name]) if name in described else tensor
        for name, tensor in stored.items()
    }


def _packed(tensor: Tensor) -> tuple[Tensor, Encoding | None]:
    if tensor.dtype == torch.bool:
        return pack_bits(tensor), ["bits", *tensor.shape]
    if tensor.dtype not in WIDE.values() or tensor.numel() == 0:
        return tensor, None
    type_name = str(tensor.dtype).removeprefix("torch.")
    narrow = narrowed(tensor)
    gaps = encode_gaps(tensor, below=narrow.nbytes) if tensor.ndim == 1 else None
    if gaps is not None:
        return gaps, ["gaps", type_name, int(tensor[0])]
    return (tensor, None) if narrow.dtype == tensor.dtype else (narrow, ["narrow", type_name])


def pack_bits(mask: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """A mask with 8 entries to the byte, the first in the lowest bit."""
    flat = mask.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, " bytes"], shape: tuple[int, ...]) -> Bool[Tensor, "*shape"]:
    """Undo `pack_bits` for a mask of ``shape``."""
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.reshape(-1)[: math.prod(shape)].to(torch.bool).reshape(shape)


def narrowed(integers: Int[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The same integers in the smallest type that holds them; 16-bit types and wider only get narrower."""
    low, high = int(integers.min()), int(integers.max())
    for dtype in NARROW:
        limits = torch.iinfo(dtype)
        if dtype.itemsize < integers.dtype.itemsize and limits.min <= low and high <= limits.max:
            return integers.to(dtype)
    return integers


def encode_gaps(integers: Int[Tensor, " n"], *, below: int) -> Shaped[Tensor, " m"] | None:
    """The gaps between sorted integers after the first, or None if unsorted or not under ``below`` bytes."""
    if bool((integers[1:] < integers[:-1]).any()):
        return None
    if int(integers[-1]) - int(integers[0]) > MAX_INT64:  # the difference would overflow
        return None
    gaps = integers.to(torch.int64).diff()
    lengths = {dtype: gaps.numel() + int((gaps // _escape(dtype)).sum()) for dtype in UNSIGNED}
    sizes = {dtype: dtype.itemsize * length for dtype, length in lengths.items()}
    smallest = min(UNSIGNED, key=lambda dtype: sizes[dtype])
    if sizes[smallest] >= below:
        return None
    escape = _escape(smallest)
    ends = torch.cumsum(1 + gaps // escape, dim=0) - 1
    encoded = torch.full((int(ends[-1]) + 1 if gaps.numel() else 0,), escape, dtype=torch.int64)
    encoded[ends] = gaps % escape
    return encoded.to(smallest)


def decode_gaps(encoded: Shaped[Tensor, " m"], *, first: int) -> Int64[Tensor, " n"]:
    """Undo `encode_gaps` for integers that begin with ``first``."""
    steps = encoded.to(torch.int64)
    reached = torch.cumsum(steps, dim=0)[steps != _escape(encoded.dtype)]
    return torch.cat([torch.tensor([first]), reached + first])


def _escape(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max


def _unpacked(name: str, stored: Tensor, encoding: Any) -> Tensor:
    decoders: dict[str, Callable[[Tensor, list[Any]], Tensor | None]] = {
        "bits": _from_bits,
        "narrow": _from_narrow,
        "gaps": _from_gaps,
    }
    tensor = None
    if isinstance(encoding, list) and encoding and isinstance(encoding[0], str) and encoding[0] in decoders:
        tensor = decoders[encoding[0]](stored, encoding[1:])
    if tensor is None:
        found = f"{stored.dtype} of shape {tuple(stored.shape)}"
        raise StoreError(f"the tensor {name!r} ({found}) cannot be unpacked as {str(encoding)[:80]}")
    return tensor


def _from_bits(stored: Tensor, shape: list[Any]) -> Tensor | None:
    if stored.dtype != torch.uint8 or stored.ndim != 1 or any(type(n) is not int or n < 0 for n in shape):
        return None
    if stored.numel() != -(-math.prod(shape) // 8) or math.prod(n for n in shape if n) > MAX_INT64:
        return None
    return unpack_bits(stored, tuple(shape))


def _from_narrow(stored: Tensor, arguments: list[Any]) -> Tensor | None:
    if len(arguments) != 1 or arguments[0] not in list(WIDE) or stored.dtype not in NARROW:
        return None
    dtype = WIDE[arguments[0]]
    return stored.to(dtype) if stored.dtype.itemsize < dtype.itemsize else None


def _from_gaps(stored: Tensor, arguments: list[Any]) -> Tensor | None:
    if len(arguments) != 2 or arguments[0] not in list(WIDE) or type(arguments[1]) is not int:
        return None
    if stored.dtype not in UNSIGNED or stored.ndim != 1:
        return None
    dtype, first = WIDE[arguments[0]], arguments[1]
    limits = torch.iinfo(dtype)
    steps = stored.to(torch.int64)
    if steps.numel() and int(steps[-1]) == _escape(stored.dtype):  # a gap that never ends
        return None
    if not limits.min <= first <= limits.max or first + int(steps.sum()) > limits.max:
        return None
    return decode_gaps(stored, first=first).to(dtype)
