"""Hyper-networks: one small network generates the tensors of another kind, for every site and task.

HyperFormer, Mahabadi et al. 2021, arXiv:2106.04489; Hyper-Adapters, Baziotis et al. 2022, arXiv:2205.10835;
Polyhistor, Liu et al. 2022, arXiv:2210.03265; PHA, Zhao et al. 2023, arXiv:2310.11670; magnitude-invariant
parametrisation, Ortiz et al. 2023, arXiv:2304.07645.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor

from finegraft.deltas.bottleneck import Bottleneck
from finegraft.deltas.delta import Attend, Delta, Layer, Shapes
from finegraft.deltas.generated import HEAD, KERNEL, OWN, RETRIEVER, Generated, invariant, kernel_start
from finegraft.deltas.task_rows import by_task, differs_by_sample
from finegraft.errors import RecipeError, SiteError
from finegraft.inits.factors import kaiming_uniform
from finegraft.locate.site import Site
from finegraft.recipe.part import Kind
from finegraft.registry import kinds


@kinds.register("hyper")
class Hyper(Delta):
    """The change ``of``, its tensors generated from embeddings of the task, the layer and the position.

    A network that sites have in common turns the embeddings into a code, and a head for each tensor turns the code into
    that tensor. Sites whose tensors have the same shapes share heads. ``graft.task`` says for which task;
    :func:`finegraft.materialise` makes an ordinary graft for one.

    With ``n`` numbers in the tensors of a site, ``c`` the width of the code ``code``, ``h`` of the hidden layer and
    ``e = embedding * (conditions + places)``, there are ``e h + h + h c + c`` numbers in the network, ``2 c`` in its
    normalisation, and ``c n + n`` in the heads.

    Attributes:
        of: the kind whose tensors are generated, with its settings.
        tasks: how many tasks, or their names.
        conditions: what tells tasks apart, each with a table of embeddings of its own: ``[source, target]`` makes a
            task a pair, such as two languages.
        places: what tells sites apart: their ``layer``, their ``position`` within it.
        embedding: width of each embedding.
        hidden: width of the network's hidden layer.
        code: width of what heads read.
        activation: of the hidden layer.
        skip: whether the hidden layer is added to a linear map of the embeddings.
        norm: whether the code goes through a layer normalisation.
        network_per: whether the whole ``part`` has one network with its heads, each ``stack`` of blocks (encoder and
            decoder), or each ``layer``.
        heads_per: whether all positions share the heads of a ``network``, or each ``position`` has its own.
        head_rank: inner width of heads in two factors, of which the first is common to all sites and tensors of one
            name; None for dense ones.
        start: of heads. ``kind``: generated tensors start as large as the kind starts them, so at zero where it starts
            at zero. ``normal``: deviation ``init_std``, as of the whole network. ``fan-in``: uniform within
            ``init_std sqrt(3 / (code in))`` (Chang et al. 2020).
        init_std: see ``start``.
        rescale: whether generated tensors are divided by the root of the width that heads read.
        magnitude_invariant: feed each number ``z`` of the embeddings in as ``cos(pi z / 2), sin(pi z / 2)``, whose
            length is constant, and add what is generated to tensors of the site's own, which start as the kind starts.
        template: longest side of what heads generate, the template: each tensor is the Kronecker product of a kernel of
            the site's own, common to all tasks, and its template. None generates whole tensors.
        retriever: whether a perceptron, trained by controller ``prototypes``, maps what the sites give for a sample to
            a vector that lies near its task's embedding; see :func:`finegraft.nearest_tasks`.
    """

    kind = "hyper"
    on = ("linear", "conv", "embedding", "norm", "tensor", "sublayer", "attention")

    of: Kind = Bottleneck()
    tasks: PositiveInt | tuple[str, ...] = 1
    conditions: Annotated[tuple[str, ...], Field(min_length=1)] = ("task",)
    places: tuple[Literal["layer", "position"], ...] = ("layer", "position")
    embedding: PositiveInt = 64
    hidden: Annotated[int, Field(ge=8)] = 128
    code: Annotated[int, Field(ge=8)] = 64
    activation: Literal["relu", "leaky_relu"] = "relu"
    skip: bool = False
    norm: bool = True
    network_per: Literal["part", "stack", "layer"] = "part"
    heads_per: Literal["network", "position"] = "network"
    head_rank: PositiveInt | None = None
    start: Literal["kind", "normal", "fan-in"] = "kind"
    init_std: PositiveFloat = 0.01
    rescale: bool = False
    magnitude_invariant: bool = False
    template: PositiveInt | None = None
    retriever: bool = False

    @field_validator("of")
    @classmethod
    def _can_be_generated(cls, of: Delta) -> Delta:
        if isinstance(of, Hyper) or of.needs_selection or of.in_place or not of.scalable or of.shared:
            raise ValueError(
                f"kind {of.kind!r} cannot be generated: it trains numbers of the base's own, or shares its tensors "
                "between sites; give one that adds tensors at each site, such as 'bottleneck', 'low-rank' or "
                "'scale-shift'"
            )
        return of

    @field_validator("tasks", "conditions")
    @classmethod
    def _distinct(cls, names: Any) -> Any:
        if isinstance(names, tuple) and (not names or len(set(names)) < len(names)):
            raise ValueError(f"give at least one name, and each once, not {list(names)}")
        return names

    @model_validator(mode="after")
    def _names_tensors(self) -> Hyper:
        if strange := [name for name in self.conditions if not name.isidentifier() or name in ("layer", "position")]:
            raise ValueError(f"conditions: {strange[0]!r} should be a name of letters, other than layer and position")
        if self.retriever and len(self.conditions) > 1:
            raise ValueError("a retriever finds one embedding: give one condition")
        return self

    @property
    def known_tasks(self) -> tuple[tuple[str, ...], ...]:
        names = self.tasks if isinstance(self.tasks, tuple) else tuple(map(str, range(self.tasks)))
        return (names,) * len(self.conditions)

    @property
    def auxiliary(self) -> tuple[str, ...]:
        return tuple(RETRIEVER) if self.retriever else ()

    @property
    def reads_weight(self) -> bool:
        return self.of.reads_weight

    @property
    def mergeable(self) -> bool:
        return self.of.mergeable

    @property
    def passes_straight(self) -> bool:
        return self.of.passes_straight

    @property
    def starts_as_identity(self) -> bool:
        return self.start == "kind" and self.of.starts_as_identity

    @property
    def rounds_at_start(self) -> bool:
        return self.of.rounds_at_start

    @property
    def saturated_at_start(self) -> bool:
        return self.of.saturated_at_start

    def at(self, site: Site) -> Hyper:
        return self.model_copy(update={"of": self.of.at(site)})

    def fits(self, site: Site) -> None:
        super().fits(site)
        self.of.fits(site)
        if self.retriever and site.type in ("attention", "tensor"):
            raise SiteError(f"a retriever reads what layers give; {site.name!r} is a {site.type} site")
        for name, shape in self.of.shapes(site).items():
            if bad := [side for side in shape if self.template and side > self.template and side % self.template]:
                raise SiteError(
                    f"template {self.template} does not divide {bad[0]}, a side of {name!r} at {site.name!r}: use a "
                    "divisor of the widths, or generate whole tensors (template: null)"
                )

    def _templates(self, site: Site) -> Shapes:
        """Shapes of what the heads of a site generate."""
        whole = self.of.shapes(site)
        if self.template is None:
            return whole
        return {name: tuple(min(side, self.template) for side in shape) for name, shape in whole.items()}

    def _network(self) -> Shapes:
        read = self.embedding * (len(self.conditions) + len(self.places)) * (2 if self.magnitude_invariant else 1)
        into = self.code if self.skip else read
        shapes: Shapes = {"entry": (self.code, read), "entry_bias": (self.code,)} if self.skip else {}
        shapes |= {"inner": (self.hidden, into), "inner_bias": (self.hidden,)}
        shapes |= {"outer": (self.code, self.hidden), "outer_bias": (self.code,)}
        return shapes | ({"code_gain": (self.code,), "code_bias": (self.code,)} if self.norm else {})

    def _heads(self, site: Site) -> Shapes:
        read = self.head_rank or self.code
        templates = self._templates(site)
        heads = {f"{name}{HEAD}": (*shape, read) for name, shape in templates.items()}
        heads |= {f"{name}{HEAD}_bias": shape for name, shape in templates.items()}
        return heads | ({f"{name}{HEAD}_factor": (read, self.code) for name in templates} if self.head_rank else {})

    def _tables(self) -> Shapes:
        count = len(self.known_tasks[0])
        tables: Shapes = {f"{name}_embedding": (count, self.embedding) for name in self.conditions}
        return tables | {f"{name}_embedding": (self.embedding,) for name in self.places}

    def _kernels(self, site: Site) -> Shapes:
        templates = self._templates(site).items()
        whole = self.of.shapes(site)
        if self.template is None:
            return {}
        return {f"{n}{KERNEL}": tuple(a // b for a, b in zip(whole[n], s, strict=True)) for n, s in templates}

    def _own(self, site: Site) -> Shapes:
        return {f"{name}{OWN}": s for name, s in self.of.shapes(site).items()} if self.magnitude_invariant else {}

    def _retriever(self, site: Site) -> Shapes:
        sizes = ((self.hidden, site.channels), (self.hidden,), (self.embedding, self.hidden), (self.embedding,))
        return dict(zip(RETRIEVER, sizes, strict=True)) if self.retriever else {}

    def shapes(self, site: Site) -> Shapes:
        generator = self._tables() | self._network() | self._heads(site) | self._kernels(site)
        return generator | self._own(site) | self._retriever(site)

    def constants(self, site: Site) -> Shapes:
        return self.of.constants(site)

    def working(self, site: Site) -> dict[str, Tensor]:
        return self.of.working(site)

    def sharing(self, site: Site) -> dict[str, str]:
        position = site.name.removeprefix(f"{site.block}.") if site.block else site.name
        scope = {"part": "", "stack": site.stack, "layer": site.block}[self.network_per]
        labels = {f"{name}_embedding": "" for name in self.conditions}
        labels |= {f"{n}_embedding": {"layer": site.block, "position": position}[n] for n in self.places}
        labels |= dict.fromkeys(self._network(), scope)
        by_position = position if self.heads_per == "position" else ""
        for name, shape in self._heads(site).items():
            sides = "x".join(map(str, shape))
            labels[name] = scope if name.endswith("_factor") else f"{scope}/{by_position}/{sides}"
        return labels | {name: f"{shape}" for name, shape in self._retriever(site).items()}

    def initial(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        start = self.of.initial(site, rng)
        own = self.of.shapes(site)
        fixed = {name: tensor for name, tensor in start.items() if name not in own}
        if self.magnitude_invariant:
            fixed |= {f"{name}{OWN}": tensor for name, tensor in start.items() if name in own}
        sizes, levels = self._starts(site, start) if self.start == "kind" else ({}, {})
        templates = self._templates(site)
        tables = {name: self._embedded(shape, rng) for name, shape in self._tables().items()}
        network = {name: self._woven(name, shape, rng) for name, shape in self._network().items()}
        kernels = {name: kernel_start(shape, rng) for name, shape in self._kernels(site).items()}
        heads = {
            name: self._headed(name, shape, sizes, rng)
            for name, shape in self._heads(site).items()
            if not name.endswith("_bias")
        }
        biases = {f"{name}{HEAD}_bias": torch.full(shape, levels.get(name, 0.0)) for name, shape in templates.items()}
        retriever = {name: kaiming_uniform(s, rng) for name, s in self._retriever(site).items() if len(s) > 1}
        return fixed | tables | network | kernels | heads | biases | retriever

    def _starts(self, site: Site, start: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """For each tensor of the kind the size of its random start, and the number that it starts at where it is one.

        Values at which a kind starts at each site are left to the site's own tensors.
        """
        again = self.of.initial(site, torch.Generator().manual_seed(1))
        sizes, levels = {}, {}
        for name in self.of.shapes(site):
            tensor = start.get(name, torch.zeros(1))
            drawn = not torch.equal(tensor, again.get(name, tensor))
            size, level = float(tensor.square().mean().sqrt()), float(tensor.mean())
            shared = abs(level) < size / 2 if drawn else bool((tensor == level).all())
            if not (shared or self.magnitude_invariant):
                raise SiteError(
                    f"kind {self.of.kind!r} starts {name!r} at {site.name!r} at values of its own, which no network "
                    "gives all sites: set magnitude_invariant: true, so that it is added to them"
                )
            sizes[name] = size if drawn else 0.0
            levels[name] = 0.0 if drawn or self.magnitude_invariant else level
        return sizes, levels

    def _embedded(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        draw = torch.rand if self.magnitude_invariant else torch.randn
        return draw(shape, generator=rng)

    def _woven(self, name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape) if name == "code_gain" else torch.zeros(shape)
        if self.start == "normal":
            return self.init_std * torch.randn(shape, generator=rng)
        if self.magnitude_invariant:
            return torch.randn(shape, generator=rng) * math.sqrt(2 / shape[0])
        return kaiming_uniform(shape, rng)

    def _headed(
        self, name: str, shape: tuple[int, ...], sizes: dict[str, float], rng: torch.Generator
    ) -> Float[Tensor, "*tensor read"]:
        normal = torch.randn(shape, generator=rng)
        if name.endswith("_factor"):
            return normal * (self.init_std if self.start == "normal" else 1 / math.sqrt(shape[-1]))
        if self.start == "normal":
            return self.init_std * normal
        if self.start == "fan-in":
            into = shape[-2] if len(shape) > 2 else 1
            return kaiming_uniform(shape, rng) * self.init_std * math.sqrt(3 / into)
        return normal * sizes[name.removesuffix(HEAD)] / (1.0 if self.rescale else math.sqrt(shape[-1]))

    def code_for(self, p: Any, task: tuple[int, ...]) -> Float[Tensor, " code"]:
        """What the heads of a site read, for one task."""
        found = [getattr(p, f"{name}_embedding")[number] for name, number in zip(self.conditions, task, strict=True)]
        z = torch.cat([*found, *(getattr(p, f"{name}_embedding") for name in self.places)])
        if self.magnitude_invariant:
            z = invariant(z)
        if self.skip:
            z = F.linear(z, p.entry, p.entry_bias)
        hidden = getattr(F, self.activation)(F.linear(z, p.inner, p.inner_bias))
        code = F.linear(hidden, p.outer, p.outer_bias)
        code = z + code if self.skip else code
        return F.layer_norm(code, code.shape, p.code_gain, p.code_bias) if self.norm else code

    def tensor(self, p: Any, name: str, code: Float[Tensor, " code"]) -> Tensor:
        """One tensor of the generated kind."""
        read = code if self.head_rank is None else getattr(p, f"{name}{HEAD}_factor") @ code
        made = getattr(p, f"{name}{HEAD}") @ read + getattr(p, f"{name}{HEAD}_bias")
        if self.rescale:
            made = made / math.sqrt(len(read))
        if (kernel := getattr(p, f"{name}{KERNEL}", None)) is not None:
            made = torch.kron(kernel, made)
        return getattr(p, f"{name}{OWN}") + made if self.magnitude_invariant else made

    def made(self, p: Any, task: tuple[int, ...] | None = None) -> Generated:
        """What the generated kind reads at a site: for this task, or for the one that ``graft.task`` says."""
        task = p.task if task is None else task
        if differs_by_sample(task):
            raise RecipeError(
                f"graft.task differs by sample, but kind {self.of.kind!r} acts at {p.site!r} as one change on the "
                "whole batch: set one task for all of it"
            )
        code = self.code_for(p, task or (0,) * len(self.conditions))
        return Generated(p, lambda name: self.tensor(p, name, code))

    def weight(self, p: Any, w: Tensor) -> Tensor:
        return self.of.weight(self.made(p), w)

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        return self.of.bias(self.made(p), b)

    def bias_over(self, p: Any, b: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        return self.of.bias_over(self.made(p), b, weight)

    def forward(self, p: Any, layer: Layer, x: Tensor) -> Tensor:
        if differs_by_sample(p.task):
            y = by_task(lambda task, own, rows: self.of.forward(self.made(p, task), own, rows), p.task, layer, x)
        else:
            y = self.of.forward(self.made(p), layer, x)
        if self.retriever:
            channels_last = y.detach().movedim(p.op.channels, -1)
            p.state = channels_last.flatten(1, -2).mean(1) if y.ndim > 2 else channels_last
        return y

    def retrieved(self, p: Any) -> Float[Tensor, "samples embedding"]:
        """Unit vectors for the samples that went through a site last, to be compared with embeddings of tasks."""
        state = p.state.to(p.retriever_inner.dtype)
        hidden = F.relu(F.linear(state, p.retriever_inner, p.retriever_inner_bias))
        return F.normalize(F.linear(hidden, p.retriever_outer, p.retriever_outer_bias), dim=-1)

    def prototypes(self, p: Any) -> Float[Tensor, "tasks embedding"]:
        """The embeddings of tasks as unit vectors."""
        return F.normalize(getattr(p, f"{self.conditions[0]}_embedding"), dim=-1)

    def attend(
        self, p: Any, call: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> Any:
        return self.of.attend(self.made(p), call, query, key, value, mask, **settings)

    def row_norms(self, p: Any, layer: Layer) -> Float[Tensor, " out"]:
        return self.of.row_norms(self.made(p), layer)

    def has_effect(self, p: Any, site: Site) -> bool:
        tasks = itertools.product(*(range(len(names)) for names in self.known_tasks))
        return any(self.of.has_effect(self.made(p, task), site) for task in tasks)
