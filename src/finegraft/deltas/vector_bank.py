"""Low-rank factors made of the vectors of one bank (VB-LoRA, Li et al. 2024, arXiv:2405.15179)."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finegraft.deltas.additive import Factored
from finegraft.deltas.delta import Shapes
from finegraft.errors import StoreError
from finegraft.locate.site import Site
from finegraft.registry import kinds

Several = Annotated[int, Field(ge=2)]

_SIDES = ("a", "b")
_BELOW = 1.0
"""How far the logits that a file leaves out lie below the least that it holds."""


@kinds.register("vector-bank")
class VectorBank(Factored):
    """``W + B A`` where every ``length`` numbers of a row of ``A`` or a column of ``B`` are a mixture of bank vectors.

    Each mixture has logits over all vectors, and is the sum of the ``top`` largest's vectors by their softmax. The bank
    is common to all sites of the part. A file holds the bank, and of each mixture which vectors and ``top - 1``
    differences of logits. It does not start as the identity.

    Attributes:
        rank: inner width.
        vectors: ``h`` of the bank; ``rank (in + out) / length * h`` logits at a site.
        length: of a vector; where it does not divide both ``out`` and ``in``, the largest length below that does.
            Sites of another length have a bank of their own.
        top: vectors of a mixture, at least two: the logit of a single one would take no gradient.
        bank_bound: the bank starts uniform within this.
        logits_std: deviation of the logits at the start.
    """

    kind = "vector-bank"

    rank: PositiveInt = 4
    vectors: Several = 256
    length: PositiveInt = 256
    top: Several = 2
    bank_bound: PositiveFloat = 0.02
    logits_std: PositiveFloat = 0.1

    @model_validator(mode="after")
    def _has_as_many(self) -> VectorBank:
        if self.top > self.vectors:
            raise ValueError(f"a bank of {self.vectors} vectors cannot mix {self.top} of them")
        return self

    @property
    def starts_as_identity(self) -> bool:
        return False

    def sharing(self, site: Site) -> dict[str, str]:
        return {"bank": str(self._length(site))}

    def _length(self, site: Site) -> int:
        common = math.gcd(site.fan_in, site.fan_out)
        return max(n for n in range(1, min(self.length, common) + 1) if common % n == 0)

    def shapes(self, site: Site) -> Shapes:
        length = self._length(site)
        return {
            "bank": (self.vectors, length),
            "logits_a": (*site.batch, self.rank, site.fan_in // length, self.vectors),
            "logits_b": (*site.batch, site.fan_out // length, self.rank, self.vectors),
        }

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        bank = torch.empty(shapes.pop("bank")).uniform_(-self.bank_bound, self.bank_bound, generator=rng)
        return {"bank": bank} | {n: self.logits_std * torch.randn(s, generator=rng) for n, s in shapes.items()}

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        a, b = (self._made(getattr(p, f"logits_{side}"), p.bank) for side in _SIDES)
        return a.flatten(-2), b.transpose(-1, -2).flatten(-3, -2)

    def _made(self, logits: Tensor, bank: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self._mixed(logits, bank)
        # Done again in backward: the vectors of the mixtures take more room than what they make.
        made: Tensor = checkpoint(self._mixed, logits, bank, use_reentrant=False, preserve_rng_state=False)
        return made

    def _mixed(self, logits: Float[Tensor, "*pieces h"], bank: Tensor) -> Float[Tensor, "*pieces length"]:
        largest, index = logits.topk(self.top)
        vectors = F.embedding(index, bank.to(logits.device))
        return (torch.softmax(largest, dim=-1).unsqueeze(-2) @ vectors).squeeze(-2)

    def saved(self, p: Any, site: Site) -> dict[str, Tensor]:
        found = {"bank": p.bank}
        for side in _SIDES:
            largest, index = getattr(p, f"logits_{side}").topk(self.top)
            found[f"top_{side}"] = index.to(torch.uint8 if self.vectors <= 256 else torch.int32)
            found[f"odds_{side}"] = largest[..., 1:] - largest[..., :1]
        return found

    def loaded(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = dict(found)
        for side in _SIDES:
            index, odds = whole.pop(f"top_{side}", None), whole.pop(f"odds_{side}", None)
            if index is not None and odds is not None:
                whole[f"logits_{side}"] = self._logits(index, odds)
        return whole

    def _logits(self, index: Tensor, odds: Tensor) -> Tensor:
        fits = index.ndim > 1 and index.shape[-1] == self.top and odds.shape == (*index.shape[:-1], self.top - 1)
        fits = fits and odds.is_floating_point()
        index = index if index.is_floating_point() or index.dtype == torch.bool else index.long()
        if not fits or index.dtype != torch.int64 or bool(((index < 0) | (index >= self.vectors)).any()):
            raise StoreError(
                f"a file of kind {self.kind!r} should say which {self.top} of {self.vectors} vectors make each piece, "
                f"and {self.top - 1} differences of logits; it holds {tuple(index.shape)} {index.dtype} numbers and "
                f"{tuple(odds.shape)} {odds.dtype} differences"
            )
        kept = torch.cat([odds.new_zeros(*odds.shape[:-1], 1), odds], dim=-1)
        others = (kept[..., -1:] - _BELOW).expand(*kept.shape[:-1], self.vectors)
        return others.scatter(-1, index, kept)
