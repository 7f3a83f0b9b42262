"""The language of ``where``: what fits, and that nothing is ever passed over in silence."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from finegraft.errors import SiteError
from finegraft.locate import sites
from tests.models import zoo

BERT, T5 = sites(zoo.build("bert")[0]), sites(zoo.build("t5-gated")[0])
LAYER = "bert.encoder.layer"


def _names(found):
    return [site.name for site in found]


class TestFits:
    def test_without_arguments_all_layers_and_tensors_fit(self):
        assert {site.kind for site in T5.where()} == {"layer"}
        assert len(BERT.where()) == 4 + 2 * 8 + 2

    def test_elements_of_one_argument_add_up_and_arguments_narrow(self):
        assert _names(BERT.where(role=["q", "down"], layer=1)) == [
            f"{LAYER}.1.attention.self.query",
            f"{LAYER}.1.output.dense",
        ]

    @pytest.mark.parametrize(
        ("layer", "expected"),
        [
            (3, [3]),
            ("3", [3]),
            ("1-3", [1, 2, 3]),
            ("4-4", [4]),
            ("first:2", [0, 1]),
            ("last:2", [4, 5]),
            ("even", [0, 2, 4]),
            ("odd", [1, 3, 5]),
            (["first:1", 5], [0, 5]),
            (["!0", "!last:2"], [1, 2, 3]),
            (["0-3", "!odd"], [0, 2]),
            ([1, "9?"], [1]),
            ("last:6", [0, 1, 2, 3, 4, 5]),
            ("last:9?", [0, 1, 2, 3, 4, 5]),
        ],
    )
    def test_layers(self, layer, expected):
        found = sites(nn.ModuleDict({"layers": nn.ModuleList(_block() for _ in range(6))}))
        assert [site.layer for site in found.where(role="q", layer=layer)] == expected

    def test_last_counts_from_the_end_of_each_stack(self):
        towers = nn.ModuleDict({name: nn.ModuleList(_block() for _ in range(n)) for name, n in (("a", 2), ("b", 4))})
        found = sites(towers).where(role="q", layer="last:1")
        assert _names(found) == ["a.1.self_attn.q_proj", "b.3.self_attn.q_proj"]

    def test_last_counts_from_the_end_of_the_model_also_when_narrowed_before(self):
        narrowed = BERT.where(layer=0)
        with pytest.raises(SiteError, match="'last:1' fits no site"):
            narrowed.where(layer="last:1")

    def test_names_are_globs_over_whole_names(self):
        assert _names(BERT.where(name="*.layer.*.query")) == [f"{LAYER}.{i}.attention.self.query" for i in (0, 1)]
        assert _names(BERT.where(name="classifier")) == ["classifier"]
        with pytest.raises(SiteError, match="'query' fits no site; names like it"):
            BERT.where(name="query")

    def test_names_are_regular_expressions_after_re(self):
        assert _names(BERT.where(name=r"re:layer\.1\..*\.(query|key)$")) == [
            f"{LAYER}.1.attention.self.query",
            f"{LAYER}.1.attention.self.key",
        ]

    def test_types_and_kinds(self):
        assert {site.type for site in BERT.where(type=["norm", "embedding"])} == {"norm", "embedding"}
        assert {site.kind for site in BERT.where(kind=["sublayer", "layer"])} == {"sublayer", "layer"}
        assert {site.kind for site in BERT.where(kind=["!layer", "!network"])} == {
            "sublayer",
            "block",
            "attention",
            "input",
        }

    def test_sublayers_and_attention_calls_come_when_asked_for(self):
        assert _names(BERT.where(role="attn")) == [f"{LAYER}.0.attn", f"{LAYER}.1.attn"]
        assert _names(BERT.where(role="attention", layer=1)) == [f"{LAYER}.1.attention.self"]
        assert {site.role for site in BERT.where(role=["q", "ffn"])} == {"q", "ffn"}
        assert {site.role for site in BERT.where(type="sublayer")} == {"attn", "ffn"}
        assert {site.role for site in BERT.where(kind="sublayer")} == {"attn", "ffn"}
        assert "attn" not in {site.role for site in BERT.where(name=f"{LAYER}.*")}

    def test_exclusion_alone_starts_from_everything(self):
        assert {site.role for site in BERT.where(role=["!norm", "!embed"])} == {
            *("q", "k", "v", "o", "up", "down"),
            *("other", "head"),
        }

    def test_optional_elements_may_fit_nothing(self):
        assert BERT.where(role=["q", "gate?"])[0].role == "q"
        assert {site.role for site in BERT.where(role=["!gate?", "!q"])} >= {"k", "v"}
        assert len(T5.where(role=["gate?", "up?"])) == 8

    def test_narrowing_keeps_the_order_of_the_model(self):
        assert _names(BERT.where(role=["o", "q"], layer=0)) == [
            f"{LAYER}.0.attention.self.query",
            f"{LAYER}.0.attention.output.dense",
        ]


class TestErrors:
    @pytest.mark.parametrize(
        ("query", "message"),
        [
            ({"role": "qq"}, "role 'qq' fits no site; there are the roles embed (3), norm (5), q (2)"),
            ({"role": ["q", "gate"]}, "role 'gate' fits no site"),
            ({"role": ["q", "head"], "layer": 0}, "role 'head' fits no site among the sites that the other"),
            ({"role": "!gate"}, "role '!gate' fits no site"),
            ({"layer": [0, 7]}, "layer '7' fits no site; there are the roles"),
            ({"layer": 7}, "layers 0-1"),
            (
                {"layer": "top"},
                "layer 'top' is not understood; give an index such as 3, a range such as '0-3'",
            ),
            ({"layer": "last:99"}, "layer 'last:99' asks for 99 blocks; the deepest stack has 2. Give 'last:2'"),
            ({"layer": "9" * 5000}, f"layer '{'9' * 60}...' is not understood"),
            ({"layer": 10**5000}, "layer is a number of thousands of digits"),
            ({"layer": "3-1"}, "layer '3-1' runs backwards; give '1-3'"),
            ({"layer": -1}, "layer '-1' is not understood"),
            ({"name": ["*query", "*qery"]}, "name '*qery' fits no site; names like it: "),
            ({"name": "re:("}, "name: '(' is not a valid regular expression"),
            ({"name": f"{LAYER}.0.ffn"}, "fits no layer or tensor; give kind='sublayer'"),
            (
                {"type": "conv"},
                "type 'conv' fits no site; there are the types embedding (3), norm (5), linear (14)",
            ),
            ({"kind": "tensor"}, "kind 'tensor' fits no site; there are the kinds layer (22), sublayer (4)"),
            ({"role": "gate?"}, "no site fits role='gate?'; there are the roles"),
            ({"role": ["q", "!q"]}, "no site fits role=['q', '!q']"),
            ({"role": []}, "role is an empty list"),
        ],
    )
    def test_say_what_and_what_there_is(self, query, message):
        with pytest.raises(SiteError, match=re.escape(message)):
            BERT.where(**query)

    def test_name_the_site_that_holds_a_tied_tensor(self):
        found = sites(zoo.build("llama-tied")[0])
        for ask in (lambda: found.where(name="lm_head"), lambda: found["lm_head"]):
            with pytest.raises(SiteError, match=r"shares its tensor with 'model\.embed_tokens'"):
                ask()

    def test_blame_the_element_that_fits_nothing_anywhere(self):
        with pytest.raises(SiteError, match=rf"name '{LAYER}.0.qery' fits no site; names like it"):
            BERT.where(role="q", layer=1, name=f"{LAYER}.0.qery")

    def test_suggest_only_names_that_the_other_arguments_leave(self):
        with pytest.raises(SiteError, match=rf"leave; names like it: {LAYER}\.1\.attention\.self\.query$"):
            BERT.where(name=["*.1.*.query", f"{LAYER}.0.attention.self.query"], layer=1, role="q")

    def test_say_when_arguments_contradict_each_other(self):
        with pytest.raises(SiteError, match="no site fits role='q', name='classifier', type='norm' all together"):
            BERT.where(role="q", type="norm", name="classifier")

    def test_an_unknown_name_suggests_the_nearest(self):
        with pytest.raises(SiteError, match="no site is named 'clasifier'; names like it: classifier"):
            BERT["clasifier"]

    def test_a_model_without_parameters_has_nothing_to_offer(self):
        with pytest.raises(SiteError, match="no site fits an empty query; there are no sites"):
            sites(nn.ReLU()).where()


class TestCollection:
    def test_is_a_sequence_indexed_by_position_and_name(self):
        assert BERT[0].name == "bert.embeddings.word_embeddings"
        assert BERT["classifier"].role == "head"
        assert BERT["classifier"] in BERT
        assert "classifier" in BERT
        assert "pooler" not in BERT
        assert len(BERT[:3]) == 3
        assert _names(BERT) == [site.name for site in BERT]

    def test_shows_what_it_holds(self):
        assert repr(BERT.where(role="head")) == (
            "Sites(1:\n  Site('classifier', linear, role=head, layer=None, shape=(3, 32)))"
        )


ROLES = ["q", "k", "v", "o", "up", "down", "norm", "embed", "head", "other"]


class TestLaws:
    @given(st.lists(st.sampled_from(ROLES), min_size=1, unique=True))
    def test_roles_and_their_exclusion_share_out_the_model(self, roles):
        chosen = set(_names(BERT.where(role=roles)))
        if len(roles) == len(ROLES):
            with pytest.raises(SiteError):
                BERT.where(role=[f"!{role}" for role in roles])
        else:
            rest = set(_names(BERT.where(role=[f"!{role}" for role in roles])))
            assert chosen.isdisjoint(rest)
            assert chosen | rest == set(_names(BERT.where()))

    @given(st.lists(st.sampled_from(ROLES), min_size=1, unique=True), st.sampled_from([0, 1, "even", "last:1"]))
    def test_arguments_commute(self, roles, layer):
        optional = [f"{role}?" for role in roles]
        try:
            together = _names(BERT.where(role=optional, layer=layer))
        except SiteError:
            together = []
        found = {site.name for site in BERT.where(layer=layer)} & {site.name for site in BERT.where(role=roles)}
        assert together == [name for name in _names(BERT) if name in found]

    @given(st.sampled_from(_names(BERT.where())))
    def test_every_name_finds_itself(self, name):
        assert _names(BERT.where(name=name)) == [name]
        assert _names(BERT.where(name=f"re:^{re.escape(name)}$")) == [name]

    @given(st.text(max_size=8), st.sampled_from(["role", "layer", "name", "type", "kind"]))
    def test_any_text_finds_something_or_is_refused(self, text, axis):
        try:
            found = len(BERT.where(**{axis: text}))
        except SiteError:
            return
        assert found > 0


def _block() -> nn.Module:
    attention = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "o_proj": nn.Linear(2, 2)})
    return nn.ModuleDict({"self_attn": attention, "up_proj": nn.Linear(2, 2), "down_proj": nn.Linear(2, 2)})
