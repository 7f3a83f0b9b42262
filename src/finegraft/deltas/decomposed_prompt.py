"""A short prompt and a low-rank update of the tokens' vectors (DePT, Shi & Lipani 2024, arXiv:2309.05173)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from finegraft.deltas.delta import Delta, Entering, Shapes
from finegraft.deltas.prompt import Prompt
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.registry import kinds


@kinds.register("decomposed-prompt")
class DecomposedPrompt(Prompt):
    """``[P; E + A B / sqrt(r)]``: row ``i`` of ``A B`` belongs to the token at place ``i`` of its text, not to its id.

    Tokens past ``places`` keep their vectors. With ``fusion`` the prompt attends to the rows of ``A B``,
    ``P + softmax(P K^T / sqrt(d)) K``, and with ``spaces`` it is the sum of itself and low-rank maps of itself under a
    softmax gate on its mean (EPT, Lan et al. 2024, arXiv:2405.11464, whose shapes are not published: these are ours).

    Attributes:
        length: positions of the prompt.
        places: rows of ``A``: tokens whose vectors change.
        rank: inner width of ``A B``.
        fusion: whether the prompt attends to ``A B``.
        spaces: maps of the prompt; 0 for none.
        space_rank: their inner width.
    """

    kind = "decomposed-prompt"
    on = ("input",)
    reads_weight: ClassVar[bool] = False

    places: PositiveInt = 256
    rank: PositiveInt = 8
    fusion: bool = False
    spaces: Annotated[int, Field(ge=0, le=16)] = 0
    space_rank: PositiveInt = 8

    @model_validator(mode="after")
    def _has_no_perceptron(self) -> DecomposedPrompt:
        if self.hidden is not None:
            raise ValueError("a decomposed prompt trains directly: leave out hidden")
        return self

    def shapes(self, site: Site) -> Shapes:
        width = site.fan_out
        found: Shapes = {"prompt": (self.length, width), "a": (self.places, self.rank), "b": (self.rank, width)}
        if self.spaces:
            spaces: Shapes = {
                "down": (self.spaces, self.space_rank, width),
                "up": (self.spaces, width, self.space_rank),
            }
            found |= {**spaces, "gate": (self.spaces, width)}
        return found

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        start = super().initial(site, rng) | {"a": kaiming_uniform(shapes["a"], rng)}
        return start | ({"down": kaiming_uniform(shapes["down"], rng)} if self.spaces else {})

    def saved(self, p: Any, site: Site) -> dict[str, Tensor]:
        return Delta.saved(self, p, site)

    def update(self, p: Any) -> Float[Tensor, "places width"]:
        """What is added to the tokens' vectors, by place."""
        return p.a @ p.b * self.rank**-0.5

    def positions(self, p: Any) -> Float[Tensor, "length width"]:
        prompt: Tensor = p.prompt
        if self.fusion:
            known = self.update(p)
            prompt = prompt + torch.softmax(prompt @ known.T * prompt.shape[-1] ** -0.5, dim=-1) @ known
        if self.spaces:
            mapped = prompt @ p.down.transpose(-1, -2) @ p.up.transpose(-1, -2)
            gate = torch.softmax(p.gate @ prompt.mean(dim=0), dim=0)
            prompt = prompt + torch.einsum("s,slw->lw", gate, mapped)
        return prompt

    def enter(self, p: Any, entering: Entering) -> tuple[Float[Tensor, "#batch length width"] | None, Tensor]:
        x, index = entering.x, entering.index
        if index is None:
            index = torch.arange(x.shape[1], device=x.device)[None]
        rows = self.update(p)[index.clamp(max=self.places - 1)] * (index < self.places).unsqueeze(-1)
        return self.positions(p)[None], x + rows.to(x.dtype)
