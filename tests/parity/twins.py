"""The same model twice, changed once by finegraft and once by PEFT, with their tensors matched one to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from finegraft.grafting import Graft, graft
from finegraft.grafting.slot import Slot
from finegraft.recipe import Recipe
from finegraft.registry import methods
from tests.models import zoo

RANK, ALPHA = 4, 6.0
METHODS = ("lora", "rslora", "dora", "ia3", "pissa", "olora")
LINEAR = {"type": "linear", "role": ["!head?", "!lm_head?"]}
LAYERS = {**LINEAR, "type": ["linear?", "conv?"]}


@dataclass(frozen=True)
class Match:
    """One trained tensor in both libraries.

    Attributes:
        name: ``site/part.position/tensor`` of ours.
        ours: our parameter.
        theirs: PEFT's, of as many numbers.
        transposed: whether PEFT keeps the matrix the other way round, as it does for embeddings.
        one_more: what PEFT's numbers are ahead by: its (IA)^3 factor is ``l``, ours ``1 + g``.
    """

    name: str
    ours: nn.Parameter
    theirs: nn.Parameter
    transposed: bool = False
    one_more: float = 0.0

    def in_our_layout(self, theirs: Tensor) -> Tensor:
        return theirs.t() if self.transposed else theirs.reshape(self.ours.shape)

    @torch.no_grad()
    def copy_to_theirs(self) -> None:
        ours = self.ours.t() if self.transposed else self.ours.reshape(self.theirs.shape)
        self.theirs.copy_(ours + self.one_more)

    @torch.no_grad()
    def copy_to_ours(self) -> None:
        self.ours.copy_(self.in_our_layout(self.theirs) - self.one_more)


@dataclass
class Twins:
    """A base under a graft, its copy under a PEFT adapter, and a batch for both."""

    ours: nn.Module
    theirs: peft.PeftModel
    graft: Graft
    matches: list[Match]
    batch: zoo.Batch

    def trained_alike(self) -> Twins:
        """Give both the same random numbers, as far from the start as training would take them."""
        rng = torch.Generator().manual_seed(7)
        for match in self.matches:
            noise = 0.2 * torch.randn(match.ours.shape, generator=rng).to(match.ours.dtype)
            with torch.no_grad():
                match.ours.add_(match.ours * noise if match.name.endswith("magnitude") else noise)
            match.copy_to_theirs()
        return self

    def to(self, dtype: torch.dtype) -> Twins:
        """Both, and the batch, in another precision."""
        self.ours.to(dtype)
        self.theirs.to(dtype)
        self.batch = {n: t.to(dtype) if t.is_floating_point() else t for n, t in self.batch.items()}
        return self

    def runs(self) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor | None]]:
        """Output, gradients of trained tensors in our layout, and gradient of the input: ours, then theirs."""
        for model, mine in ((self.ours, True), (self.theirs, False)):
            model.zero_grad()
            entry = entry_of(model)
            y, x = _run(model, entry, self.batch)
            loss(y).backward()
            grads = {
                m.name: m.ours.grad.clone() if mine else m.in_our_layout(m.theirs.grad).clone() for m in self.matches
            }
            yield y.detach(), grads, None if x is None else x.grad

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Output of ours and of theirs, without gradients."""
        with torch.no_grad():
            return zoo.output(self.ours(**self.batch)), zoo.output(self.theirs(**self.batch))


def twins(name: str, recipe: Recipe, config: Callable[[list[str]], peft.PeftConfig], *, seed: int = 3) -> Twins:
    """A model of the zoo, twice: grafted with a recipe, and under what ``config`` makes of the matched names."""
    ours, batch = zoo.build(name, seed)
    theirs, _ = zoo.build(name, seed)
    grafted = graft(ours, recipe)
    names = list(dict.fromkeys(slot.site for slot in grafted.all_slots))
    theirs = peft.get_peft_model(theirs, config(names), autocast_adapter_dtype=False).eval()
    return Twins(ours, theirs, grafted, matches(grafted, theirs), batch)


def method_twins(name: str, method: str, *, where: dict[str, Any] | None = None, dropout: float = 0.0) -> Twins:
    """Twins under a method of the catalogue that PEFT has as well."""
    if method == "ia3":
        return twins(name, methods["ia3"].override(heads="none"), lambda names: _ia3(name, names))
    where = where or (LINEAR if method in ("pissa", "olora") else LAYERS)
    settings = {"rank": RANK, "alpha": ALPHA, "dropout": dropout, "heads": "none", **where}
    return twins(name, methods[method].override(**settings), lambda names: lora_config(method, names, dropout))


def lora_config(method: str, names: list[str], dropout: float = 0.0) -> peft.LoraConfig:
    """PEFT's configuration for one of its low-rank methods on exactly these layers."""
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules=names,
        use_rslora=method == "rslora",
        use_dora=method == "dora",
        init_lora_weights=method if method in ("pissa", "olora") else True,
    )


def _ia3(name: str, names: list[str]) -> peft.IA3Config:
    down = {"bert": "output.dense", "llama": "down_proj", "vit": "mlp.fc2", "gpt2": "mlp.c_proj"}[name]
    inward = [site for site in names if site.endswith(down)]
    return peft.IA3Config(target_modules=names, feedforward_modules=inward)


def matches(grafted: Graft, theirs: peft.PeftModel, adapter: str = "default") -> list[Match]:
    """Our trained tensors beside PEFT's."""
    return [match for slot in grafted.all_slots for match in _matches_at(slot, theirs, adapter)]


def _matches_at(slot: Slot, theirs: peft.PeftModel, adapter: str) -> list[Match]:
    layer = theirs.base_model.model.get_submodule(slot.site)
    if slot.delta.kind == "scale-shift":
        return [Match(f"{slot.key}/scale", slot.scale, layer.ia3_l[adapter], one_more=1.0)]
    if slot.delta.kind == "magnitude":
        return [Match(f"{slot.key}/magnitude", slot.magnitude, layer.lora_magnitude_vector[adapter].weight)]
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
        return [Match(f"{slot.key}/a", slot.a, a, transposed=True), Match(f"{slot.key}/b", slot.b, b, transposed=True)]
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return [Match(f"{slot.key}/a", slot.a, a), Match(f"{slot.key}/b", slot.b, b)]


def loss(y: Tensor) -> Tensor:
    """Every output with a weight of its own; no activation that saturates, so that no gradient dies."""
    return (torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) * y).sum()


def entry_of(model: nn.Module) -> nn.Module | None:
    """The table that turns token ids into vectors; None where the batch is real numbers already."""
    base = model.base_model.model if isinstance(model, peft.PeftModel) else model
    return base.get_input_embeddings() if hasattr(base, "get_input_embeddings") and hasattr(base, "config") else None


def _run(model: nn.Module, entry: nn.Module | None, batch: zoo.Batch) -> tuple[Tensor, Tensor | None]:
    """The output, and the input as a leaf that takes a gradient."""
    batch = dict(batch)
    if "input_ids" not in batch:
        name = next(iter(batch))
        batch[name] = x = batch[name].clone().requires_grad_()
    elif any(p.requires_grad for p in entry.parameters()):
        return zoo.output(model(**batch)), None
    else:
        batch["inputs_embeds"] = x = entry(batch.pop("input_ids")).detach().requires_grad_()
    return zoo.output(model(**batch)), x
