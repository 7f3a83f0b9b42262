"""Soft prompts: trained vectors before those of the input (prompt tuning, Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from finegraft.deltas.delta import Delta, Entering, Shapes
from finegraft.deltas.perceptron import mlp, mlp_initial, mlp_shapes
from finegraft.errors import SiteError
from finegraft.locate.site import Site
from finegraft.registry import kinds

Start = Literal["random", "vocabulary", "text"]
COMMON_WORDS = 5000
"""Entries at the head of a vocabulary, which are its most frequent ones in most tokenizers, that prompts start from."""


@kinds.register("prompt")
class Prompt(Delta):
    """``[P; X]`` for embedded input ``X``, in every stack that it is put before.

    The prompt stands before the first token that the mask leaves in (in an image, behind the class tokens), counts as
    positions of its own, and is gone where the blocks end: pooling, labels and losses are those of the tokens. Only a
    decoder reads what an encoder makes of it. With ``hidden`` the table goes through a perceptron while it trains
    (P-tuning, Liu et al. 2021, arXiv:2103.10385); files hold what it gives.

    Attributes:
        length: positions; ``length * width`` numbers.
        start: values at the start, which is not the identity. ``random`` draws them with deviation ``init_std``,
            ``vocabulary`` takes vectors of the 5000 first entries of the vocabulary, ``text`` those of ``tokens``.
        tokens: ids to start from, in order and again from the first where ``length`` is larger: of a text that says the
            task, or of the labels' names.
        init_std: deviation of a random start, and of the table behind a perceptron.
        hidden: width of the perceptron; None trains the vectors themselves.
    """

    kind = "prompt"
    on = ("input",)
    reads_weight: ClassVar[bool] = False

    length: PositiveInt = 20
    start: Start = "random"
    tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    init_std: PositiveFloat = 0.02
    hidden: PositiveInt | None = None

    @model_validator(mode="after")
    def _start_has_tokens(self) -> Prompt:
        if (self.start == "text") != bool(self.tokens):
            raise ValueError("start 'text' takes the ids in tokens, and no other start has any")
        if self.hidden is not None and self.start != "random":
            raise ValueError(f"behind a perceptron (hidden) the table starts at random, not from {self.start!r}")
        return self

    @property
    def starts_as_identity(self) -> bool:
        return False

    def folded(self) -> Delta:
        return self if self.hidden is None else self.model_copy(update={"hidden": None})

    def fits(self, site: Site) -> None:
        super().fits(site)
        table = site.input.table
        if self.start != "random" and table is None:
            raise SiteError(f"{site.name!r} takes no token ids, so a prompt there starts at random, not {self.start!r}")
        if self.tokens and max(self.tokens) >= (entries := len(table.weight)):
            raise SiteError(f"token {max(self.tokens)} is not among the {entries} of {site.name!r}")
        if site.input.positions is not None and self.length >= site.input.positions:
            raise SiteError(
                f"a prompt of {self.length} leaves no room for tokens at {site.name!r}: there are the "
                f"{site.input.positions} positions of the model"
            )

    def shapes(self, site: Site) -> Shapes:
        table: Shapes = {"prompt": (self.length, site.fan_out)}
        if self.hidden is None:
            return table
        return table | mlp_shapes((site.fan_out, self.hidden, self.hidden, site.fan_out))

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        return {"prompt": self._table(site, rng), **mlp_initial(shapes, rng)}

    def _table(self, site: Site, rng: torch.Generator) -> Float[Tensor, "length width"]:
        if self.start == "random":
            return torch.randn((self.length, site.fan_out), generator=rng) * self.init_std
        table = site.input.table
        if self.start == "text":
            ids = torch.tensor([self.tokens[i % len(self.tokens)] for i in range(self.length)])
        else:
            ids = torch.randint(min(len(table.weight), COMMON_WORDS), (self.length,), generator=rng)
        found: Tensor = table(ids.to(table.weight.device))
        return found.detach().float().cpu().clone()

    def saved(self, p: Any, site: Site) -> dict[str, Tensor]:
        return {"prompt": self.positions(p)}

    def positions(self, p: Any) -> Float[Tensor, "length width"]:
        """The vectors that enter."""
        found: Tensor = p.prompt
        return found if self.hidden is None else mlp(p, found, torch.relu)

    def has_effect(self, p: Any, site: Site) -> bool:
        return True

    def enter(self, p: Any, entering: Entering) -> tuple[Float[Tensor, "#batch length width"] | None, Tensor]:
        return self.positions(p)[None], entering.x
