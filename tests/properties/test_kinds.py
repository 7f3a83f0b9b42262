"""Every law, for every registered kind, on every base it goes on. A new kind falls under them by being registered."""

from __future__ import annotations

import pytest

from finegraft.registry import kinds
from finegraft.testing.bases import BASES
from finegraft.testing.conformance import bases_for, hold
from finegraft.testing.laws import LAWS

PAIRS = [(kind, base) for kind in kinds for base in bases_for(kind)]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize(("kind", "base"), PAIRS, ids=[f"{kind}-{base}" for kind, base in PAIRS])
def test_law(kind, base, law):
    hold(law, kind, base)


@pytest.mark.parametrize("kind", list(kinds))
def test_every_site_type_that_a_kind_names_is_tried(kind):
    assert {base.site.type for base in BASES if base.site.type in kinds[kind].on} == set(kinds[kind].on)
