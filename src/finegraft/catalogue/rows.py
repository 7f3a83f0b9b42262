"""How a row of the catalogue is filed."""

from __future__ import annotations

from typing import Any

from finegraft.errors import RecipeError
from finegraft.recipe import Recipe
from finegraft.registry import methods

LINEAR = {"type": "linear", "role": ["!head?", "!lm_head?", "!router?"]}


def method(name: str, paper: str, year: int, url: str, **recipe: Any) -> None:
    """File a method: its name, its paper, and the fields of its :class:`~finegraft.recipe.Recipe`."""
    if methods.filed(name):
        raise RecipeError(f"method {name!r} stands in the catalogue twice")
    source = {"title": paper, "year": year, "url": url}
    methods.register(name)(Recipe.parse({"name": name, "source": source, **recipe}))
