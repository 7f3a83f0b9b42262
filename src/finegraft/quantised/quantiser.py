"""What a format for fewer bits is: two functions, there and back."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from finegraft.errors import SiteError
from finegraft.recipe.spec import Spec

Codes = dict[str, Tensor]


class Quantiser(Spec):
    """A format, as settings and two functions; register yours by ``@quantisers.register(name)``.

    Attributes:
        kind: the name, set by the class.
    """

    kind: ClassVar[str]

    def quantise(self, w: Float[Tensor, "out in"]) -> Codes:
        """Tensors that stand for a matrix in single precision, by names of your own."""
        raise NotImplementedError(self.kind)

    def dequantise(self, codes: Codes, shape: tuple[int, ...]) -> Float[Tensor, "out in"]:
        """The matrix of this shape that the tensors stand for, in single precision."""
        raise NotImplementedError(self.kind)

    def bits(self, codes: Codes, shape: tuple[int, ...]) -> float:
        """Bits of memory for each number."""
        return 8 * sum(t.numel() * t.element_size() for t in codes.values()) / (shape[0] * shape[1])

    def bound(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"] | None:
        """The most by which each entry can differ after going there and back; None where that is not known."""
        return None

    def fits(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise :class:`SiteError` where a matrix cannot be kept in this format."""
        if len(shape) != 2:
            raise SiteError(f"{name!r} is no matrix but {shape}: quantise linear layers")
