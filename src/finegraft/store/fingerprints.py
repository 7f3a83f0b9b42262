"""Which base a graft belongs to: a short hash of its architecture and one of its values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated

import torch
from jaxtyping import Int64, Shaped
from pydantic import BaseModel, Field
from torch import Tensor

from finegraft.errors import BaseMismatch, StoreError
from finegraft.quantised.stored import logical_shape, telling

SAMPLES = 1024  # entries read per tensor: enough to tell checkpoints apart, quick on any size of model

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class Fingerprint(BaseModel, frozen=True, extra="forbid", strict=True):
    """Identity of a base.

    Attributes:
        structure: SHA-256 over the sorted names and shapes of its tensors.
        content: SHA-256 over samples of their values, rounded to bfloat16.
        tensors: number of tensors.
        parameters: number of entries in all of them.
        name: what the user calls the base (a hub id, a path); for messages, never compared.
    """

    structure: Hash
    content: Hash
    tensors: Count
    parameters: Count
    name: str | None = None

    def __str__(self) -> str:
        name = f"{self.name} " if self.name else ""
        return (
            f"{name}[structure {self.structure[:12]}, content {self.content[:12]}, "
            f"{self.tensors:,} tensors, {self.parameters:,} parameters]"
        )


def fingerprint(tensors: Iterable[tuple[str, Tensor]], *, name: str | None = None) -> Fingerprint:
    """The fingerprint of a base, the same in whatever order its tensors come.

    At most 1024 evenly strided entries of each tensor are read, the first and the last always among them, and
    rounded to bfloat16 before hashing. A checkpoint therefore has one fingerprint whether it is loaded in
    float32 or bfloat16. Quantised weights count by the numbers they stand for. Loaded in float16 it may have
    another: a value rounded twice can land beside one rounded once, and float16 overflows above 65504.

    Another checkpoint differs all over and is told apart with certainty; a change of a few entries of a large
    tensor can miss the samples.

    Args:
        tensors: ``(name, tensor)`` pairs such as ``model.named_parameters()`` of the untouched base.
        name: what to call the base in messages.

    Raises:
        StoreError: two tensors of one name, or a tensor without data (on the "meta" device).
    """
    structures: dict[str, bytes] = {}
    contents: list[tuple[str, bytes]] = []
    parameters = 0
    for tensor_name, tensor in tensors:
        if tensor_name in structures:
            raise StoreError(f"the base has two tensors named {tensor_name!r}; each needs its own name")
        if tensor.is_meta:
            raise StoreError(
                f"{tensor_name!r} is on the meta device and has no values to fingerprint: load the base's weights first"
            )
        structures[tensor_name] = repr(logical_shape(tensor)).encode()
        contents.append((tensor_name, _sampled_bytes(telling(tensor).detach())))
        parameters += tensor.numel()
    return Fingerprint(
        structure=_combined(structures.items()),
        content=_combined(contents),
        tensors=len(structures),
        parameters=parameters,
        name=name,
    )


def check(expected: Fingerprint, actual: Fingerprint) -> None:
    """Return if both are the same base.

    Args:
        expected: the base a graft was made for.
        actual: the base at hand.

    Raises:
        BaseMismatch: naming both, and saying whether the architecture differs or only the values.
    """
    if expected.structure != actual.structure:
        raise BaseMismatch(
            f"this graft belongs to a base of another architecture: made for {expected}, given {actual}"
            f"{_difference(expected, actual)}"
        )
    if expected.content != actual.content:
        raise BaseMismatch(
            f"this graft belongs to a base of the same architecture with other values: made for {expected}, "
            f"given {actual}. Load the checkpoint it was made for, as it was before any tuning or merging "
            "(in float32 or bfloat16: float16 can round differently)"
        )


def sample_positions(count: int) -> Int64[Tensor, " samples"]:
    """At most `SAMPLES` flat positions among ``count``, evenly strided from the first to the last."""
    if count <= SAMPLES:
        return torch.arange(count)
    return torch.arange(SAMPLES) * (count - 1) // (SAMPLES - 1)


def _sampled_bytes(tensor: Shaped[Tensor, "*shape"]) -> bytes:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    positions = sample_positions(tensor.numel()).to(tensor.device)
    # Indexed per axis, because flattening a transposed weight would copy all of it
    samples = tensor[torch.unravel_index(positions, tensor.shape)] if tensor.ndim else tensor.reshape(1)
    rounded = samples.to(torch.bfloat16).view(torch.int16).cpu()
    return rounded.numpy().astype("<i2").tobytes()


def _combined(entries: Iterable[tuple[str, bytes]]) -> str:
    total = hashlib.sha256()
    for name, payload in sorted(entries):
        # Fixed-length digests leave no way to shift bytes between a name and its payload.
        total.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(payload).digest())
    return total.hexdigest()


def _difference(expected: Fingerprint, actual: Fingerprint) -> str:
    if (expected.tensors, expected.parameters) == (actual.tensors, actual.parameters):
        return "; the counts agree, so names or shapes differ"
    return (
        f"; {actual.tensors - expected.tensors:+,} tensors and {actual.parameters - expected.parameters:+,} parameters"
    )
