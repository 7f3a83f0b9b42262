"""Recipes: where x what x init x train, as validated data that YAML can carry both ways."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from finegraft.errors import RecipeError
from finegraft.registry import kinds, nearest

Unit = Literal["entry", "row", "column", "module"]
Density = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Names = str | list[str]


class Spec(BaseModel):
    """A frozen, strict piece of a recipe: unknown keys and wrong types are errors, as are infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            types = _types(cls.model_fields[name].annotation) if name in cls.model_fields else set()
            if types & {int, float} and bool not in types and _holds_bool(value):
                raise ValueError(f"{name} takes a number, not {value!r}")
        return data


def _types(annotation: Any) -> set[Any]:
    return {annotation}.union(*map(_types, get_args(annotation))) if get_args(annotation) else {annotation}


def _holds_bool(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, bool) for item in values)


class Where(Spec):
    """A query over sites; every element must match, elements ending in ``?`` may be absent, ``!`` excludes.

    Attributes:
        role: what the site does (``q``, ``k``, ``up``, ``norm`` ...); attn and ffn are whole sublayers.
        layer: block numbers, or ``"0-3"``, ``"last:2"``, ``"first:2"``, ``"even"``, ``"odd"``.
        name: a glob over site names, or a regular expression after ``re:``.
        type: linear, conv, embedding, norm, tensor, sublayer or attention.
        kind: layer, tensor, sublayer or attention.
    """

    role: Names | None = None
    layer: int | str | list[int | str] | None = None
    name: Names | None = None
    type: Names | None = None
    kind: Names | None = None


class Select(Spec):
    """Which parts of a site train.

    Attributes:
        unit: entry, row or column of the matrix, or module (whole sites are chosen).
        score: a registered score: random, magnitude, gradient ...
        density: share of units chosen, in (0, 1]. Give this or ``count`` or ``like_rank``.
        count: number of units chosen per site.
        like_rank: as many entries as a low-rank change of this rank would have numbers: ``rank * (out + in)``.
        largest: take the highest scores (the default) or the lowest.
    """

    unit: Unit
    score: str = "random"
    density: Density | None = None
    count: PositiveInt | None = None
    like_rank: PositiveInt | None = None
    largest: bool = True
    filter_rank: PositiveInt = 128

    @model_validator(mode="after")
    def _one_budget(self) -> Select:
        given = [n for n in ("density", "count", "like_rank") if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of density, count and like_rank; found {found}")
        if self.like_rank is not None and self.unit != "entry":
            raise ValueError(f"like_rank counts entries; it does not fit unit {self.unit!r}")
        return self


def _kind(value: Any) -> Any:
    if hasattr(value, "needs_selection"):
        return value
    value = _spelled_out(value)
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError(f"what: needs a kind ({', '.join(kinds)})")
    settings = {k: v for k, v in value.items() if k != "kind"}
    try:
        return kinds[value["kind"]].model_validate(settings)
    except ValidationError as error:
        raise ValueError(explain(error, f"kind {value['kind']!r}")) from None


def _spelled_out(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _kind_data(delta: Any) -> dict[str, Any]:
    return {"kind": delta.kind, **delta.model_dump(mode="json", exclude_defaults=True)}


Kind = Annotated[Any, BeforeValidator(_kind), PlainSerializer(_kind_data)]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def _trains_units(what: Any) -> bool:
    name = what.get("kind") if isinstance(what, dict) else None
    return isinstance(name, str) and name in kinds and kinds[name].needs_selection


class Part(Spec):
    """One where x what of a recipe.

    Attributes:
        where: the sites.
        what: one kind of change, or several that act one upon the other, innermost first; the name alone will do for
            a kind with its default settings.
        select: which parts of each site train, for kinds that train a selection.
    """

    where: Where
    what: Annotated[tuple[Kind, ...], BeforeValidator(_as_list), Field(min_length=1)]
    select: Select | None = None

    @model_validator(mode="before")
    @classmethod
    def _select_gives_unit(cls, data: Any) -> Any:
        """A kind that trains chosen units takes their unit from ``select``, so that it is said once."""
        select = data.get("select") if isinstance(data, dict) else None
        unit = select.get("unit") if isinstance(select, dict) else getattr(select, "unit", None)
        if unit in (None, "module") or "what" not in data:
            return data
        what = [{"unit": unit, **w} if _trains_units(w) else w for w in map(_spelled_out, _as_list(data["what"]))]
        return {**data, "what": what}

    @model_validator(mode="after")
    def _fits(self) -> Part:
        selective = [d.kind for d in self.what if d.needs_selection]
        if selective and (self.select is None or self.select.unit == "module"):
            raise ValueError(f"kind {selective[0]!r} needs select: with unit entry, row or column")
        if self.select is not None and self.select.unit != "module" and not selective:
            names = ", ".join(d.kind for d in self.what)
            raise ValueError(f"select unit {self.select.unit!r} has no use with kind {names}; use kind 'sparse'")
        for delta in self.what:
            if self.select is not None and delta.needs_selection and delta.unit != self.select.unit:
                raise ValueError(f"kind {delta.kind!r} says unit {delta.unit!r}, select says {self.select.unit!r}")
        return self


class Train(Spec):
    """How a graft is trained.

    Attributes:
        lr: peak learning rate.
        optimizer: ``adamw``, or any optimizer of ``torch.optim`` by its lower-case name.
        betas: moment decays of Adam-like optimizers.
        weight_decay: decoupled decay; it pulls changes towards the base, since changes start at zero.
        warmup: share of all steps during which the rate rises.
        schedule: shape of the decay after that.
        lr_ratios: factor on ``lr`` by tensor name, such as ``{b: 16}`` (LoRA+).
        head_lr: learning rate of newly added heads; None takes ``lr``.
        clip: largest norm of the gradient; None leaves it.
    """

    lr: PositiveFloat = 1e-3
    optimizer: str = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    warmup: Share = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    lr_ratios: dict[str, PositiveFloat] = Field(default_factory=dict)
    head_lr: PositiveFloat | None = None
    clip: PositiveFloat | None = 1.0


class Source(Spec):
    """Where a method comes from: title, year, and a place to find it."""

    title: str
    year: int | None = None
    url: str | None = None


class Recipe(Spec):
    """Everything needed to make a graft.

    Attributes:
        name: the method's name, lower case with hyphens; free text for your own.
        parts: the changes, where by where.
        heads: ``auto`` trains classification heads whole; ``none`` leaves them; or globs over site names.
        train: defaults for training.
        roles: overrides of inferred roles, ``{regex on the site name: role}``.
        source: the paper.
        note: what a user should know, such as where this differs from the paper.
    """

    name: str = "custom"
    parts: tuple[Part, ...] = ()
    heads: Literal["auto", "none"] | list[str] = "auto"
    train: Train = Train()
    roles: dict[str, str] = Field(default_factory=dict)
    source: Source | None = None
    note: str = ""

    @field_validator("train")
    @classmethod
    def _optimizer_exists(cls, train: Train) -> Train:
        if train.optimizer != Train().optimizer:
            known = _optimizers()
            if train.optimizer not in known:
                raise ValueError(f"unknown optimizer {train.optimizer!r}; {nearest(train.optimizer, known)}")
        return train

    @classmethod
    def parse(cls, data: Any) -> Recipe:
        """A recipe from plain data; every problem is reported with its place in the data.

        Raises:
            RecipeError: unknown keys, wrong types or contradictory settings.
        """
        if isinstance(data, Recipe):
            return data
        if not isinstance(data, dict):
            raise RecipeError(f"a recipe is a mapping with parts:, not {type(data).__name__}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(explain(error, f"recipe {data.get('name', 'custom')!r}")) from None

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file.

        Raises:
            RecipeError: no such file, not YAML in UTF-8, a key given twice, or no valid recipe.
        """
        try:
            data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_DistinctKeys)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise RecipeError(f"cannot read a recipe from {path}: {error}") from None
        return cls.parse(data)

    def data(self) -> dict[str, Any]:
        """Plain data that :meth:`parse` turns back into an equal recipe."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_yaml(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.data(), sort_keys=False, allow_unicode=True)

    def override(self, **settings: Any) -> Recipe:
        """The recipe with settings replaced wherever they occur: in kinds, selections, training, or at the top.

        ``recipe.override(rank=16, lr=1e-4)`` reaches every kind that has a rank. ``density`` replaces any other budget.

        Raises:
            RecipeError: a setting that nothing in the recipe has.
        """
        data = self.data()
        for name, value in settings.items():
            if not _override(data, name, value, self):
                known = sorted(_settings(self))
                raise RecipeError(f"method {self.name!r} has no setting {name!r}; {nearest(name, known)}")
        return Recipe.parse(data)


class _DistinctKeys(yaml.SafeLoader):
    """YAML in which no mapping has a key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise yaml.composer.ComposerError(problem=f"line {line}: {key.value!r} is given twice")
                seen.add((key.tag, key.value))
        return node


def _optimizers() -> list[str]:
    """Names of the optimizers of torch, which is imported only where one has to be looked up."""
    torch = importlib.import_module("torch")
    found = (value for value in vars(torch.optim).values() if isinstance(value, type))
    return sorted(v.__name__.lower() for v in found if issubclass(v, torch.optim.Optimizer))


_BUDGETS = ("density", "count", "like_rank")


def _settings(recipe: Recipe) -> set[str]:
    names = set(Train.model_fields) | {"heads"}
    for part in recipe.parts:
        names |= {n for delta in part.what for n in type(delta).model_fields}
        names |= set(Where.model_fields) | (set(Select.model_fields) if part.select else set())
    return names


def _override(data: dict[str, Any], name: str, value: Any, recipe: Recipe) -> bool:
    reached = False
    for part, target in zip(recipe.parts, data.get("parts", []), strict=True):
        for delta, settings in zip(part.what, target["what"], strict=True):
            if name in type(delta).model_fields:
                settings[name], reached = value, True
        if part.select is not None and name in Select.model_fields:
            if name in _BUDGETS:
                for other in _BUDGETS:
                    target["select"].pop(other, None)
            target["select"][name], reached = value, True
        if name in Where.model_fields:
            target["where"][name], reached = value, True
    if name in Train.model_fields:
        data.setdefault("train", {})[name], reached = value, True
    if name == "heads":
        data["heads"], reached = value, True
    return reached


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes out no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) < 200 else f"{text[:200]}..."


def explain(error: ValidationError, what: str) -> str:
    """Pydantic's findings as one readable message: a line for each, with its place."""
    lines = []
    for finding in error.errors():
        place = ".".join(str(p) for p in finding["loc"]) or "top"
        message = finding["msg"].removeprefix("Value error, ")
        if finding["type"] == "extra_forbidden":
            message = f"unknown key {finding['loc'][-1]!r}"
        shown = (
            ""
            if finding["type"] in ("value_error", "extra_forbidden", "missing")
            else f" (got {_shown(finding['input'])})"
        )
        lines.append(f"{place}: {message}{shown}")
    return f"{what} is not valid:\n  " + "\n  ".join(lines)
