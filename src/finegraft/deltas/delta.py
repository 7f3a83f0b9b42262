"""The algebra: a change maps a layer function to a new layer function."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from finegraft.errors import NotMergeable, SiteError
from finegraft.locate.ops import Op
from finegraft.locate.site import Site
from finegraft.quantised.stored import is_quantised
from finegraft.recipe import Spec

Shapes = dict[str, tuple[int, ...]]
Needed = Bool[Tensor, "batch tokens"] | Int[Tensor, "batch needed"]


class Attend(Protocol):
    """An attention call as a change sees it.

    Attributes:
        module: the base's attention module.
        x: what that module was given, ``(batch, queries, width)``.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def x(self) -> Tensor: ...

    def __call__(self, *tensors: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
        """The output ``(batch, queries, heads, width)``, and the attention map where it is asked for."""
        ...


class Layer(Protocol):
    """A layer as a change sees it: a function, and (where it has one) its effective weight.

    Attributes:
        op: how the layer computes.
        module: the base's module.
        bare: whether it is the base's own layer, of floating-point numbers, with nothing put on it or trained in it.
        weight: the effective canonical matrix ``(*batch, out, in)``; reading it may build a dense tensor.
        bias: the effective bias or None.
        states: on a whole stack of blocks, the hidden states of the pass; else None.
    """

    op: Op
    module: nn.Module

    @property
    def states(self) -> Any: ...

    @property
    def bare(self) -> bool: ...

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer under another canonical weight and bias."""
        ...

    def row_norms(self) -> Float[Tensor, " out"]:
        """Euclidean norm of the weight of each output channel, without gradient."""
        ...


@dataclass(frozen=True)
class Entering:
    """What enters a stack of blocks in one pass.

    Attributes:
        x: vectors of the tokens.
        ids: their ids; None where vectors were given, or the sequence is no text.
        mask: which of them are tokens rather than padding; None where all are.
        index: their places in the text, from the sample's first token on; None where the sequence is no text.
    """

    x: Float[Tensor, "batch n width"]
    ids: Int[Tensor, "batch n"] | None = None
    mask: Bool[Tensor, "batch n"] | None = None
    index: Int[Tensor, "#batch n"] | None = None


class Delta(Spec):
    """A kind of change: hyper-parameters only; its tensors live in the graft and come in as ``p``.

    A new weight-space kind needs :meth:`shapes` and :meth:`weight`. Overriding :meth:`forward` makes it fast;
    the two must agree. A change of activations overrides :meth:`forward` alone and cannot merge.

    Attributes:
        kind: the name in recipes; set by the class.
        needs_selection: whether it trains chosen units, and so needs ``select:`` in the recipe.
        in_place: whether it can train inside the base's own tensors (see ``deltas/in_place.py``).
        scalable: whether ``graft.scale`` applies; new heads replace, so they cannot be scaled.
        hides: whether what lies beneath does not act, since it gives a weight of its own.
        reads_weight: whether :meth:`forward` needs the effective weight of the layer beneath.
        on: site types on which it is defined.
        needs: the statistic of calibration batches that :meth:`initial` looks at, as ``site.statistic``: ``covariance``
            of inputs or ``gradient`` of the loss, summed over batches; None for starts that look at no data.
        shared: names of tensors that all sites of a recipe's part have in common: one tensor, which trains, counts and
            is saved once. Its shape is the same at every site; it starts as the part's first site draws it. See
            :meth:`sharing` for those that only some of the sites have in common.
    """

    kind: ClassVar[str]
    needs_selection: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    scalable: ClassVar[bool] = True
    hides: ClassVar[bool] = False
    on: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "norm", "tensor")
    shared: ClassVar[tuple[str, ...]] = ()

    @property
    def reads_weight(self) -> bool:
        """Whether :meth:`forward` asks the layer beneath for its weight."""
        return type(self).forward is Delta.forward

    @property
    def needs(self) -> Literal["covariance", "gradient"] | None:
        """The statistic of calibration batches that a fresh change is made from."""
        return None

    @property
    def sources(self) -> tuple[str, ...]:
        """Folders of saved grafts whose low-rank factors :meth:`initial` looks at, as ``site.sources``."""
        return ()

    @property
    def mergeable(self) -> bool:
        """Whether a weight can express the change."""
        return type(self).weight is not Delta.weight

    @property
    def starts_as_identity(self) -> bool:
        """Whether a fresh change leaves every output as it was."""
        return True

    @property
    def rounds_at_start(self) -> bool:
        """Whether that holds up to rounding only, because the start is added and subtracted again."""
        return False

    @property
    def saturated_at_start(self) -> bool:
        """Whether a fresh change gets no gradient from the loss, until noise or a penalty has moved it."""
        return False

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        """Axes along which tensors count ranks, by name, for kinds whose ranks can be dropped, added or truncated."""
        return {}

    def frames(self, p: Any) -> list[Float[Tensor, "*batch rank n"]]:
        """Matrices whose rows a penalty may keep orthonormal."""
        return []

    @property
    def passes_straight(self) -> bool:
        """Whether its gradient passes straight through a rounding, so that it is no derivative of the output."""
        return False

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Names of trained tensors that no output depends on: penalties alone train them."""
        return ()

    @property
    def known_tasks(self) -> tuple[tuple[str, ...], ...]:
        """For changes that differ by task: names of the tasks, for each condition that tells them apart."""
        return ()

    @property
    def weighed(self) -> int:
        """How many weights each sample of a batch may have, for kinds that act on each as it was weighed."""
        return 0

    def at(self, site: Site) -> Delta:
        """The change as it is at one site, for kinds whose settings depend on the site's role."""
        return self

    def sharing(self, site: Site) -> dict[str, str]:
        """Names of tensors in common with other sites of the part, each with a label: equal labels, one tensor."""
        return dict.fromkeys(self.shared, "")

    def shapes(self, site: Site) -> Shapes:
        """Shapes of the tensors that train at a site."""
        raise NotImplementedError

    def constants(self, site: Site) -> Shapes:
        """Shapes of the tensors that are kept but do not train, such as frozen factors."""
        return {}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        """Tensors at the start, by name; what is left out starts at zero."""
        return {}

    def working(self, site: Site) -> dict[str, Tensor]:
        """Tensors that accompany training and are in no file, as they are at the start and after loading."""
        return {}

    def working_key(self, site: Site) -> Hashable:
        """What the working tensors follow from beside the settings, if other sites may have the same.

        Sites with the same key, of whatever graft on the model, hold one copy. None: each site has its own.
        """
        return None

    def saved(self, p: Any, site: Site) -> dict[str, Tensor]:
        """What a file holds of the change: the tensors of :meth:`shapes` and :meth:`constants`."""
        return {name: getattr(p, name) for name in (*self.shapes(site), *self.constants(site))}

    def loaded(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that :meth:`saved` gave as training holds them, where a file keeps them in another form."""
        return found

    def fits(self, site: Site) -> None:
        """Raise :class:`SiteError` where the change is not defined."""
        if site.type not in self.on:
            raise SiteError(
                f"kind {self.kind!r} cannot be put on {site.name!r}, a {site.type} site; "
                f"it goes on {', '.join(self.on)}"
            )
        if self.in_place and is_quantised(site.parameter) and set(self.shapes(site)) != {"bias"}:
            raise SiteError(
                f"kind {self.kind!r} trains numbers of the base in place, and those of {site.name!r} are quantised; "
                "use a kind with tensors of its own, such as low-rank, or make the base dense (fg.dequantise)"
            )

    def weight(self, p: Any, w: Tensor) -> Tensor:
        """The effective canonical matrix ``(*batch, out, in)``, given the one beneath, in its dtype."""
        raise NotMergeable(f"kind {self.kind!r} changes activations in a way that no weight can express")

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        """The effective bias, given the one beneath."""
        return b

    def bias_over(self, p: Any, b: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        """The effective bias, given how to get the canonical matrix beneath.

        Override it in place of :meth:`bias` where the bias depends on the weight.
        """
        return self.bias(p, b)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        """The changed layer's output."""
        w = layer.weight
        return layer.apply(x, self.weight(p, w), self.bias_over(p, layer.bias, lambda: w))

    def needed(self, p: Any, x: Float[Tensor, "batch tokens width"]) -> Needed | None:
        """Tokens of a sublayer's or block's input that the base must run on; None for all.

        A mask, or ascending places of equally many of each sample. What :meth:`forward` is given is zero elsewhere.
        """
        return None

    def attend(
        self, p: Any, call: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> Any:
        """The changed attention call; tensors are ``(batch, heads, positions, width)``.

        ``settings["is_causal"]`` says whether a missing mask stands for a causal one.
        """
        raise NotImplementedError(self.kind)

    def enter(self, p: Any, entering: Entering) -> tuple[Float[Tensor, "#batch length width"] | None, Tensor]:
        """Positions to enter a stack before the tokens, and the tokens' vectors; on input sites.

        Once the positions are in a key-value cache they are asked for again, but do not enter again.
        """
        raise NotImplementedError(self.kind)

    def folded(self) -> Delta:
        """The change as files have it, where what trains can be folded into less; see :meth:`saved`."""
        return self

    def row_norms(self, p: Any, layer: Layer) -> Float[Tensor, " out"]:
        """Norms of the effective weight's output channels; override where no dense weight is needed."""
        return channel_norms(self.weight(p, precise(layer.weight)), layer.op)

    def has_effect(self, p: Any, site: Site) -> bool:
        """Whether the change, as trained, can change any output; asked when a graft is loaded."""
        w, b = precise(site.weight), site.bias
        if not torch.equal(self.weight(p, w), w):
            return True
        changed = self.bias_over(p, b, lambda: w)
        if changed is None:
            return False
        return bool(changed.any()) if b is None else not torch.equal(changed, b)

    def count(self, site: Site) -> int:
        """Numbers trained at a site."""
        return sum(int(torch.Size(shape).numel()) for shape in self.shapes(site).values())


def channel_norms(w: Tensor, op: Op) -> Float[Tensor, " out"]:
    """Euclidean norm of each output channel of a canonical matrix."""
    return torch.linalg.vector_norm(w, dim=-1 if op.out_axis == -2 else -2)


def precise(t: Tensor) -> Tensor:
    """The tensor in single precision, or in double where it is: what norms are taken in."""
    return t if t.dtype == torch.float64 else t.float()


def along_out(vector: Tensor, op: Op, dtype: torch.dtype) -> Tensor:
    """A vector over output channels ``(*batch, out)``, shaped to multiply a canonical matrix."""
    return vector.to(dtype).unsqueeze(-1 if op.out_axis == -2 else -2)
