"""Recipes: YAML both ways, overrides, and errors that name what is wrong and where."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finegraft.errors import RecipeError
from finegraft.recipe import Recipe, Train
from finegraft.registry import kinds, methods
from finegraft.testing import settings as kind_settings

LOW_RANK = {"where": {"role": "q"}, "what": {"kind": "low-rank"}}
SPARSE = {"where": {"type": "linear"}, "what": {"kind": "sparse"}, "select": {"unit": "row", "density": 0.1}}

wheres = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["q", ["q", "v?"], "!head?"]),
        "layer": st.sampled_from([0, "0-3", "last:2", ["even", 1]]),
        "name": st.sampled_from(["re:.*proj", "a.*.b"]),
        "type": st.sampled_from(["linear", ["linear", "conv?"]]),
    },
)
budgets = st.sampled_from([{"density": 0.25}, {"count": 3}])


@st.composite
def parts(draw):
    delta = draw(st.sampled_from(list(kinds)).flatmap(lambda name: kind_settings(kinds[name])))
    part = {"where": draw(wheres), "what": [delta]}
    if delta.needs_selection:
        part["select"] = {"unit": delta.unit, "score": draw(st.sampled_from(["random", "magnitude"])), **draw(budgets)}
        part["select"]["block"] = getattr(delta, "block", 32)
        if draw(st.booleans()):
            part["instead"] = {"what": "low-rank", "share": 0.5}
    elif draw(st.booleans()):
        part["select"] = {"unit": "module", "density": 0.5}
    return part


recipes = st.builds(
    lambda own, heads, lr, roles, note: Recipe.parse(
        {"parts": own, "heads": heads, "train": {"lr": lr}, "roles": roles, "note": note}
    ),
    st.lists(parts(), max_size=3),
    st.sampled_from(["auto", "none", ["*.classifier"]]),
    st.floats(1e-6, 1.0),
    st.sampled_from([{}, {"wi_0": "gate"}]),
    st.text(max_size=20),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(recipes)
def test_yaml_round_trip(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == recipe
    assert Recipe.parse(recipe.data()) == recipe


@pytest.mark.parametrize("name", list(methods))
def test_catalogue_round_trips(name):
    assert Recipe.parse(methods[name].data()) == methods[name]


def test_data_leaves_out_what_is_default():
    assert Recipe.parse({"parts": [LOW_RANK]}).data() == {
        "parts": [{"where": {"role": "q"}, "what": [{"kind": "low-rank"}]}]
    }


def test_unit_is_said_once():
    assert Recipe.parse({"parts": [SPARSE]}).parts[0].what[0].unit == "row"


class TestOverride:
    def test_reaches_kinds_selection_training_and_places(self):
        recipe = methods["lora"].override(rank=3, lr=0.5, role="q", heads="none")
        (part,) = recipe.parts
        assert (part.what[0].rank, recipe.train.lr, part.where.role, recipe.heads) == (3, 0.5, "q", "none")
        assert methods["lora"].parts[0].what[0].rank == 8

    def test_reaches_every_kind_that_has_the_setting(self):
        stacked = {"where": {"role": "q"}, "what": [{"kind": "low-rank"}, {"kind": "magnitude"}]}
        recipe = Recipe.parse({"parts": [LOW_RANK, stacked]}).override(rank=2)
        assert [delta.rank for part in recipe.parts for delta in part.what if delta.kind == "low-rank"] == [2, 2]

    @pytest.mark.parametrize("budget", [{"density": 0.5}, {"count": 7}])
    def test_a_budget_replaces_any_other(self, budget):
        select = Recipe.parse({"parts": [SPARSE]}).override(**budget).parts[0].select
        assert select.model_dump(include={"density", "count"}, exclude_none=True) == budget

    def test_reaches_what_is_put_instead(self):
        (part,) = methods["spt-lora"].override(rank=3, share=0.25, density=0.1).parts
        assert (part.instead.what[0].rank, part.instead.share, part.select.density) == (3, 0.25, 0.1)
        assert [delta.kind for delta in part.changes] == ["sparse", "low-rank"]

    def test_a_block_is_as_large_where_it_is_chosen_as_where_it_trains(self):
        (part,) = methods["smt"].override(block=16).parts
        assert part.select.block == part.what[0].block == 16

    def test_unknown_setting_suggests_the_nearest(self):
        with pytest.raises(RecipeError, match=r"method 'lora' has no setting 'ranks'; did you mean 'rank'\?"):
            methods["lora"].override(ranks=3)

    def test_a_value_of_the_wrong_type_is_an_error(self):
        with pytest.raises(RecipeError, match=r"(?s)kind 'low-rank'.*rank.*greater than 0.*got 0"):
            methods["lora"].override(rank=0)


BAD = {
    "not a mapping": ([], "a recipe is a mapping with parts:, not list"),
    "unknown key": ({"part": []}, "part: unknown key 'part'"),
    "unknown key within": ({"parts": [{**LOW_RANK, "were": {}}]}, "parts.0.were: unknown key 'were'"),
    "unknown kind": (
        {"parts": [{"where": {}, "what": {"kind": "lowrank"}}]},
        "unknown kind 'lowrank'; did you mean 'low-rank'?",
    ),
    "kind missing": ({"parts": [{"where": {}, "what": {"rank": 4}}]}, "what: needs a kind (ad"),
    "nothing to do": ({"parts": [{"where": {}, "what": []}]}, "parts.0.what: Value should have at least 1 item"),
    "unknown setting of a kind": (
        {"parts": [{"where": {}, "what": {"kind": "low-rank", "rnk": 4}}]},
        "rnk: unknown key 'rnk'",
    ),
    "density of zero": (
        {"parts": [{**SPARSE, "select": {"unit": "row", "density": 0}}]},
        "parts.0.select.density: Input should be greater than 0 (got 0)",
    ),
    "density above one": (
        {"parts": [{**SPARSE, "select": {"unit": "row", "density": 1.5}}]},
        "parts.0.select.density: Input should be less than or equal to 1 (got 1.5)",
    ),
    "two budgets": (
        {"parts": [{**SPARSE, "select": {"unit": "row", "density": 0.5, "count": 2}}]},
        "give exactly one of density, count, like_rank, parameters, bytes and threshold; found density and count",
    ),
    "no budget": ({"parts": [{**SPARSE, "select": {"unit": "row"}}]}, "found none of them"),
    "like_rank of rows": (
        {"parts": [{**SPARSE, "select": {"unit": "row", "like_rank": 2}}]},
        "like_rank counts entries; it does not fit unit 'row'",
    ),
    "a selection that nothing takes": (
        {"parts": [{**LOW_RANK, "select": {"unit": "row", "density": 0.5}}]},
        "select unit 'row' has no use with kind low-rank; use kind 'sparse'",
    ),
    "a selection that is missing": (
        {"parts": [{"where": {}, "what": {"kind": "sparse"}}]},
        "kind 'sparse' needs select: with a unit inside of sites, such as entry",
    ),
    "two units": (
        {"parts": [{**SPARSE, "what": {"kind": "sparse", "unit": "column"}}]},
        "kind 'sparse' says unit 'column', select says 'row'",
    ),
    "two sizes of blocks": (
        {"parts": [{**SPARSE, "what": {"kind": "sparse", "block": 8}, "select": {"unit": "block", "count": 1}}]},
        "kind 'sparse' says block 8, select says 32",
    ),
    "rows of rows": (
        {"parts": [{**SPARSE, "select": {"unit": "row", "count": 1, "scope": "row"}}]},
        "scope 'row' ranks the entries of each row; it does not fit unit 'row'",
    ),
    "a rank of rows": (
        {"parts": [{**SPARSE, "select": {"unit": "entry", "like_rank": 1, "scope": "row"}}]},
        "like_rank counts the entries of a site; under scope 'row' give count or density",
    ),
    "a threshold on chance": (
        {"parts": [{**SPARSE, "select": {"unit": "entry", "threshold": 0.5}}]},
        "threshold needs a score to hold against it; 'random' is none",
    ),
    "an unknown score": (
        {"parts": [{**SPARSE, "select": {"unit": "entry", "count": 1, "score": "magnitud"}}]},
        "unknown score 'magnitud'; did you mean 'magnitude'?",
    ),
    "instead of nothing chosen": (
        {"parts": [{**LOW_RANK, "instead": {"what": "bias", "share": 0.1}}]},
        "instead goes by what a selection takes of each site: give select a unit inside of sites",
    ),
    "units instead of units": (
        {"parts": [{**SPARSE, "instead": {"what": "sparse", "share": 0.1}}]},
        "kind 'sparse' trains chosen units; instead takes kinds that do without",
    ),
    "a share below zero": (
        {"parts": [{**SPARSE, "instead": {"what": "bias", "share": -1}}]},
        "parts.0.instead.share: Input should be greater than or equal to 0 (got -1)",
    ),
    "nothing trains": (
        {"parts": [{"where": {}, "what": {"kind": "scale-shift", "scale": False}}]},
        "scale and shift are both off",
    ),
    "wrong type": ({"train": {"lr": "fast"}}, "train.lr: Input should be a valid number"),
    "a kind that is no name": (
        {"parts": [{**SPARSE, "what": {"kind": []}}]},
        "parts.0.what.0: what: needs a kind (ad",
    ),
    "a kind that is a mapping": ({"parts": [{**LOW_RANK, "what": {"kind": {}}}]}, "needs a kind"),
    "no kind": ({"parts": [{**LOW_RANK, "what": None}]}, "needs a kind"),
    "a number for a kind": ({"parts": [{**LOW_RANK, "what": 5}]}, "needs a kind"),
    "a key that is no text": ({"parts": [{**LOW_RANK, "what": {"kind": "low-rank", 5: 1}}]}, "Keys should be strings"),
    "a top key that is no text": ({5: 1}, "Keys should be strings"),
    "rank of true": ({"parts": [{**LOW_RANK, "what": {"kind": "low-rank", "rank": True}}]}, "rank takes a number, not"),
    "layer of true": ({"parts": [{**LOW_RANK, "where": {"layer": [0, True]}}]}, "layer takes a number, not [0, True]"),
    "density of true": ({"parts": [{**SPARSE, "select": {"unit": "row", "density": True}}]}, "density takes a number"),
    "a ratio of true": ({"train": {"lr_ratios": {"b": True}}}, "lr_ratios takes a number"),
    "an infinite rate": ({"train": {"lr": float("inf")}}, "train.lr: Input should be a finite number (got inf)"),
    "a moment of one": ({"train": {"betas": [0.9, 1.0]}}, "train.betas.1: Input should be less than 1 (got 1.0)"),
    "an endless number": ({"train": {"lr": 10**5000}}, "train.lr: "),
    "unknown optimizer": (
        {"train": {"optimizer": "adamwx"}},
        "train: unknown optimizer 'adamwx'; did you mean 'adamw'?",
    ),
    "negative rate": ({"train": {"lr": -1}}, "train.lr: Input should be greater than 0 (got -1)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_recipe_is_an_error_that_says_where(what):
    data, words = BAD[what]
    with pytest.raises(RecipeError) as error:
        Recipe.parse(data)
    assert words in str(error.value)


def test_a_file_that_is_no_yaml_or_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read a recipe from .*absent\.yaml"):
        Recipe.load(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("parts: [")
    with pytest.raises(RecipeError, match=r"cannot read a recipe from .*broken\.yaml"):
        Recipe.load(tmp_path / "broken.yaml")


def test_files_that_cannot_be_read_are_errors(tmp_path):
    path = tmp_path / "recipe.yaml"
    for content, words in (
        (b"name: \xff", "can't decode byte 0xff"),
        (b"name: 2024-13-45", "month must be in 1..12"),
        (b"rank: " + b"9" * 5000, "digits"),
        (b"[" * 20_000, "recursion"),
        (b"name: a\ntrain:\n  lr: 0.1\n  lr: 0.2\n", "line 4: 'lr' is given twice"),
    ):
        path.write_bytes(content)
        with pytest.raises(RecipeError) as error:
            Recipe.load(path)
        assert "cannot read a recipe from" in str(error.value)
        assert words in str(error.value)


def test_yaml_that_merges_mappings_gives_no_key_twice(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("train:\n  <<: {lr: 0.5, clip: 2.0}\n  lr: 0.25\n")
    assert (Recipe.load(path).train.lr, Recipe.load(path).train.clip) == (0.25, 2.0)


def test_a_kind_by_its_name_alone():
    assert Recipe.parse({"parts": [{**LOW_RANK, "what": "low-rank"}]}) == Recipe.parse({"parts": [LOW_RANK]})
    assert Recipe.parse({"parts": [{**SPARSE, "what": ["sparse"]}]}).parts[0].what[0].unit == "row"


def test_an_optimizer_of_torch():
    assert Recipe.parse({"train": {"optimizer": "sgd"}}).train.optimizer == "sgd"


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Train().lr = 1.0
