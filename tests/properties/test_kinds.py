"""Every law, for every registered kind, on every type of site it goes on; a new kind falls under them by being there.

On the first base of each type of site a kind is held to all laws; on further ones, such as linear layers without a
bias, it takes them in turn.
"""

from __future__ import annotations

import pytest

from finegraft.registry import kinds
from finegraft.testing.bases import BASES
from finegraft.testing.conformance import bases_for, hold
from finegraft.testing.laws import LAWS

EXAMPLES = 2
TURNS = 3


def _cases():
    for number, kind in enumerate(kinds):
        types = set()
        for turn, base in enumerate(bases_for(kind), number):
            first = base.site.type not in types
            types.add(base.site.type)
            yield from ((law, kind, base) for i, law in enumerate(LAWS) if first or (turn + i) % TURNS == 0)


CASES = list(_cases())


@pytest.mark.parametrize(("law", "kind", "base"), CASES, ids=[f"{kind}-{base}-{law}" for law, kind, base in CASES])
def test_law(law, kind, base):
    hold(law, kind, base, examples=EXAMPLES)


@pytest.mark.parametrize("kind", list(kinds))
def test_every_site_type_that_a_kind_names_is_tried(kind):
    assert {base.site.type for base in BASES if base.site.type in kinds[kind].on} == set(kinds[kind].on)
