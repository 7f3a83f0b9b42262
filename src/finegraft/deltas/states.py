"""What a side network sees of a stack of blocks in one pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

Extended = Callable[[Hashable, int, int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class States:
    """The hidden states of a stack, and what its last block was given to attend by.

    Attributes:
        hidden: what enters the stack, then what each block gave, with gradient where the base below trains.
        mask: of self-attention: boolean where a key may be seen, or to be added to the scores; None for no mask.
        bias: of positions, to be added to the scores beside the mask.
        causal: whether no mask stands for a causal one.
        rotation: cosines and sines of the angles by which positions rotate queries and keys.
        memory: the encoder's output; None where there is none.
        memory_mask: like ``mask``, for attention to it.
        extended: ``extended(owner, index, number, keys, values)`` gives keys and values of all tokens so far, for layer
            ``index`` of ``number`` of a side network; None where no cache is in use.
    """

    hidden: tuple[Float[Tensor, "batch n width"], ...]
    mask: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = False
    rotation: tuple[Tensor, Tensor] | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    extended: Extended | None = None
