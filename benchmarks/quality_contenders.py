"""Who takes part in the comparison of selective methods, and how each is brought to the same share of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
from torch import nn

import finegraft as fg
from finegraft.grafting import Graft
from finegraft.grafting.make import resolve
from finegraft.recipe import Recipe, Train
from shapes import BERT_LAYERS

SHARE = 0.005  # of the base's numbers
CLOSE = 0.02  # how near to it a budget is brought, relatively
LINEAR = {"type": "linear", "role": ["!head?", "!lm_head?", "!router?"]}
BUDGETS = ("density", "threshold", "count", "parameters", "bytes", "like_rank")


@dataclass(frozen=True, eq=False)
class Entrant:
    """One way to train in the comparison.

    Attributes:
        name: how the table calls it.
        method: a method of the catalogue or a recipe as data; None for PEFT LoRA.
        role: ``reference``; ``random`` for a selection that looks at nothing; ``informed`` for entries or structures
            chosen by a score; ``fixed`` where the method's nature says what trains.
        changes: settings of the method that differ from its defaults.
    """

    name: str
    method: str | dict[str, Any] | None
    role: str = "fixed"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """What is trained, before its budget is brought to the common share."""
        return resolve("lora" if self.method is None else self.method, **self.changes)

    def wrapped(self, base: nn.Module) -> PeftChange | None:
        """The base under PEFT's change, which takes part as a reference; None for what finegraft trains."""
        return PeftLora(base, self.recipe.train) if self.method is None else None

    def data(self) -> dict[str, Any]:
        """All that decides what is trained, as plain data."""
        data = self.recipe.data()
        unread = {"note", "source"}
        return {"peft": self.method is None, **{key: value for key, value in data.items() if key not in unread}}


def _chosen(name: str, role: str, **changes: Any) -> Entrant:
    label = ", ".join([name, *(f"{key} {value}" for key, value in changes.items())])
    return Entrant(label, name, role, changes)


LORA = Entrant("PEFT LoRA", None, "reference")
FULL = Entrant("full", "full", "reference")
HEAD = Entrant("head only", "head", "reference")
RANDOM = Entrant("apet (random entries)", "apet", "random")
ENTRANTS = (
    FULL,
    LORA,
    HEAD,
    RANDOM,
    *(_chosen(name, "random") for name in ("shira", "s2ft")),
    *(_chosen(name, "informed") for name in ("magnitude-sparse", "gradient-sparse", "shira-snip", "lift", "sara")),
    *(_chosen(name, "informed") for name in ("neuroada", "spt", "spt-lora", "sft-ag", "sft-ma", "lt-sft", "smt")),
    _chosen("s2ft", "informed", score="magnitude"),
    *(Entrant(name, name) for name in ("r-amt", "finegates", "dopamine", "bitfit", "layer-norm", "adapterbias")),
    *(Entrant(name, name) for name in ("t-few", "hft", "lisa", "ist", "fpf", "k-fpf")),
    *(Entrant(name, name) for name in ("layerwise-decay", "freeze-lower", "top-reinit")),
)
# The catalogue's perp rows retrain a model after pruning, and no model is pruned here.
# intrinsic-dimension measures a task (finegraft intrinsic-dimension) and takes a quarter of an hour a run here.


def at_share(recipe: Recipe, model: nn.Module, calibration: list[Any], *, seed: int) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with its budget brought to `SHARE` of the base's numbers, and the settings that do it.

    A recipe that chooses no parts of matrices stays as it is.
    """
    budgets = dict(_budgets(recipe))
    if not budgets:
        return recipe, {}
    wanted = SHARE * sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifier"))
    best, changes = recipe, {}
    nearest = float("inf")
    for _ in range(4):
        trained = _trained(recipe.override(**budgets), model, calibration, seed)
        if abs(trained / wanted - 1) < nearest:
            nearest, best, changes = abs(trained / wanted - 1), recipe.override(**budgets), dict(budgets)
        if nearest < CLOSE:
            break
        budgets = {name: _scaled(value, wanted / trained) for name, value in budgets.items()}
    return best, changes


def _budgets(recipe: Recipe) -> Iterator[tuple[str, float]]:
    for part in recipe.parts:
        if part.select is not None and part.select.unit not in ("module", "layer"):
            yield from ((name, value) for name in BUDGETS if (value := getattr(part.select, name)) is not None)


def _scaled(value: float, factor: float) -> float:
    return max(1, round(value * factor)) if isinstance(value, int) else min(1.0, value * factor)


def _trained(recipe: Recipe, model: nn.Module, calibration: list[Any], seed: int) -> int:
    graft = fg.graft(model, recipe, calibration=calibration, seed=seed)
    try:
        return trained_in(graft)
    finally:
        graft.detach()


def trained_in(graft: Graft) -> int:
    """Numbers that train, the new head left out."""
    slots = [slot for slot in graft.all_slots if slot.delta.kind != "replacement"]
    return sum({id(p): p.numel() for slot in slots for p in slot.parameters()}.values())


class PeftChange:
    """A base under a change of PEFT's, behind the few names by which a trainer knows a graft.

    Args:
        model: what PEFT made of the base.
        name: how the recipe calls it.
        train: how it is trained.
    """

    def __init__(self, model: nn.Module, name: str, train: Train) -> None:
        self.model = model
        self.recipe = Recipe(name=name, train=train)

    @property
    def trained(self) -> int:
        """Numbers that train, the new head left out."""
        own = self.model.named_parameters()
        return sum(p.numel() for name, p in own if p.requires_grad and "classifier" not in name)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in self.model.parameters() if p.requires_grad)

    def parameter_groups(self) -> list[Mapping[str, Any]]:
        train = self.recipe.train
        return [{"params": list(self.parameters()), "lr": train.lr, "weight_decay": train.weight_decay}]


class PeftLora(PeftChange):
    """PEFT LoRA with as many numbers.

    Rank 3 on all linear layers, 2 where the FFN comes down, gives 115,200 numbers on MiniLM: 0.507% of it.
    """

    def __init__(self, base: nn.Module, train: Train) -> None:
        layers = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.endswith(BERT_LAYERS)]
        down = [n for n in layers if n.endswith("output.dense") and "attention" not in n]
        config = peft.LoraConfig(
            r=3,
            lora_alpha=6,
            rank_pattern=dict.fromkeys(down, 2),
            alpha_pattern=dict.fromkeys(down, 4),
            target_modules=layers,
            modules_to_save=["classifier"],
        )
        super().__init__(peft.get_peft_model(base, config), "PEFT LoRA", train)
