"""Recipes: where x what x init x train, as validated data that YAML can carry both ways."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from finegraft.errors import RecipeError
from finegraft.recipe.part import Controller, Part, Where
from finegraft.recipe.select import BUDGETS, Select
from finegraft.recipe.spec import Spec, explain
from finegraft.recipe.train import Train
from finegraft.registry import nearest, optimizers


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
        control: what acts while it trains, step by step: selections that move, penalties, freezing.
        roles: overrides of inferred roles, ``{regex on the site name: role}``.
        source: the paper.
        note: what a user should know, such as where this differs from the paper.
    """

    name: str = "custom"
    parts: tuple[Part, ...] = ()
    heads: Literal["auto", "none"] | list[str] = "auto"
    train: Train = Train()
    control: tuple[Controller, ...] = ()
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

    @field_validator("control")
    @classmethod
    def _one_freezes_sites(cls, control: tuple[Controller, ...]) -> tuple[Controller, ...]:
        freezing = [type(one).kind for one in control if type(one).freezes_sites]
        if len(freezing) > 1:
            raise ValueError(f"{' and '.join(freezing)} would each say which sites train; give one of them")
        return control

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
    """Names of all optimizers; torch is imported only where one has to be looked up."""
    torch = importlib.import_module("torch")
    found = (value for value in vars(torch.optim).values() if isinstance(value, type))
    return sorted({*(v.__name__.lower() for v in found if issubclass(v, torch.optim.Optimizer)), *optimizers})


def _settings(recipe: Recipe) -> set[str]:
    names = set(Train.model_fields) | {"heads"}
    for part in recipe.parts:
        wrapped = (delta.of for delta in part.changes if getattr(delta, "of", None) is not None)
        names |= {n for delta in (*part.changes, *wrapped) for n in type(delta).model_fields}
        names |= {"share"} if part.instead else set()
        names |= set(Where.model_fields) | (set(Select.model_fields) if part.select else set())
    return names.union(*(type(controller).model_fields for controller in recipe.control))


def _override(data: dict[str, Any], name: str, value: Any, recipe: Recipe) -> bool:
    reached = False
    for part, target in zip(recipe.parts, data.get("parts", []), strict=True):
        instead = target.get("instead", {"what": []})
        for delta, settings in zip(part.changes, [*target["what"], *instead["what"]], strict=True):
            wrapped = getattr(delta, "of", None)
            if name in type(delta).model_fields:
                settings[name], reached = value, True
            elif wrapped is not None and name in type(wrapped).model_fields:
                settings.setdefault("of", {"kind": wrapped.kind})[name], reached = value, True
        if part.instead is not None and name == "share":
            instead[name], reached = value, True
        if part.select is not None and name in Select.model_fields:
            if name in BUDGETS:
                for other in BUDGETS:
                    target["select"].pop(other, None)
            target["select"][name], reached = value, True
        if name in Where.model_fields:
            target["where"][name], reached = value, True
    for controller, settings in zip(recipe.control, data.get("control", []), strict=True):
        if name in type(controller).model_fields:
            for other in type(controller).alternatives if name in type(controller).alternatives else ():
                settings.pop(other, None)
            settings[name], reached = value, True
    if name in Train.model_fields:
        data.setdefault("train", {})[name], reached = value, True
    if name == "heads":
        data["heads"], reached = value, True
    return reached
