"""Tensors that layers have in common: trained ones of a part, and frozen ones that follow from a seed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finegraft as fg
from finegraft.deltas.tensor_product import expanded
from finegraft.errors import BaseMismatch, RecipeError, SiteError, StoreError
from finegraft.grafting.graft import Graft
from finegraft.grafting.slot import Slot
from finegraft.registry import kinds
from finegraft.store import read
from tests.deltas.structured import close, small_linear, trained

WIDTH, LAYERS = 16, 3
SHARED: dict[str, dict[str, Any]] = {
    "vector-bank": {"rank": 2, "vectors": 6, "length": 8},
    "shared-low-rank": {"rank": 3},
    "shard-pool": {"rank": 4, "pool_rank": 2, "private_rank": 1, "shards": 2},
}
X = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(5))


class Layers(nn.Module):
    """Linear layers of one width, one after the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def stack(depth: int = LAYERS) -> Layers:
    torch.manual_seed(0)
    return Layers(depth)


def grafted(model: nn.Module, kind: str, seed: int = 0, **settings: Any) -> Graft:
    what = {"kind": kind, **(settings or SHARED.get(kind, {}))}
    made = fg.graft(model, {"parts": [{"where": {"type": "linear"}, "what": what}], "heads": "none"}, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return made


COUNTS = {
    "vector-bank": 6 * 8 + LAYERS * 2 * 2 * WIDTH // 8 * 6,
    "shared-low-rank": 3 * 2 * WIDTH + LAYERS * 9,
    "shard-pool": LAYERS * (2 + 1) * 2 * WIDTH,
}


@pytest.mark.parametrize("kind", SHARED)
def test_shared_tensors_train_once_and_are_saved_once(kind, tmp_path):
    model = stack()
    graft = grafted(model, kind)
    assert graft.num_trainable == COUNTS[kind]
    expected = model(X)
    tensors, _ = read(graft.save(tmp_path / "graft"))
    common = set(graft.all_slots[0].sharing)
    assert common
    assert [name.rpartition("/")[2] in common for name in tensors].count(True) == len(common)
    other = stack()
    loaded = fg.load(tmp_path / "graft", other, trainable=True)
    assert torch.equal(other(X), expected)
    for model_, graft_ in ((other.double(), loaded), _copied(other)):
        first, *others = graft_.all_slots
        assert graft_.num_trainable == COUNTS[kind]
        assert all(getattr(slot, name) is getattr(first, name) for slot in others for name in common)
        close(model_(X.double()), expected.double(), 1e-5)


def _copied(model: nn.Module) -> tuple[nn.Module, Graft]:
    twin = copy.deepcopy(model)
    return twin, fg.grafts(twin)[0]


@pytest.mark.parametrize("kind", SHARED)
def test_samples_are_routed_through_grafts_that_share_tensors(kind):
    model = stack()
    first, second = grafted(model, kind), grafted(model, kind, seed=3)
    alone = []
    for kept, other in ((first, second), (second, first)):
        with other.disabled():
            alone.append(model(X[:2]))
        assert kept.enabled
    with fg.route(model, [first, first, second, second]):
        together = model(torch.cat([X[:2], X[:2]]))
    close(together, torch.cat(alone), 1e-6)
    expected = model(X)
    close(fg.merge(model)(X), expected, 1e-5)


def test_a_sequence_of_layers_can_be_routed():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    graft = grafted(model, "shared-low-rank")
    expected = model(X)
    with graft.disabled():
        base = model(X)
    with fg.route(model, [graft, None, graft, None]):
        routed = model(X)
    close(routed[::2], expected[::2], 1e-6)
    close(routed[1::2], base[1::2], 1e-6)


def test_a_part_on_some_sites_shares_among_these():
    part = {"where": {"name": "layers.[02]"}, "what": {"kind": "shard-pool", **SHARED["shard-pool"]}}
    model = stack()
    graft = fg.graft(model, {"parts": [part], "heads": "none"})
    assert graft.num_trainable == 2 * (2 + 1) * 2 * WIDTH
    assert {slot.pool_a.shape[0] for slot in graft.all_slots} == {2 * 2 * 2}


def test_only_sites_of_one_role_and_shape_share_factors():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, 8), nn.Linear(8, WIDTH))
    graft = grafted(model, "shared-low-rank", rank=2)
    assert [bool(slot.borrowed) for slot in graft.all_slots] == [False] * 4
    model = nn.Sequential(nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH))
    graft = grafted(model, "vector-bank", vectors=4, length=8)
    assert [bool(slot.borrowed) for slot in graft.all_slots] == [False, True]


class TestVectorBank:
    def test_a_file_holds_which_vectors_are_mixed_and_no_logits(self, tmp_path):
        graft = grafted(stack(), "vector-bank")
        tensors, _ = read(graft.save(tmp_path / "graft"))
        pieces = 2 * 2 * WIDTH // 8
        own = {name: tensor for name, tensor in tensors.items() if not name.endswith("bank")}
        assert {name.rpartition("/")[2] for name in own} == {"top_a", "top_b", "odds_a", "odds_b"}
        assert sum(t.numel() for t in own.values() if t.is_floating_point()) == LAYERS * pieces
        assert {t.dtype for name, t in own.items() if "top" in name} == {torch.uint8}

    def test_what_does_not_fit_a_bank_is_refused(self):
        delta = kinds["vector-bank"](vectors=4, top=2)
        bank, index, odds = torch.zeros(4, 8), torch.tensor([[[0, 3]]]), torch.zeros(1, 1, 1)
        cut, whole = (index[..., :1], odds), (index, odds.long())
        for top, gap in ((index + 1, odds), (index - 1, odds), cut, (index, odds[..., :0]), whole):
            with pytest.raises(StoreError, match="which 2 of 4 vectors"):
                delta.loaded({"bank": bank, "top_a": top, "odds_a": gap})

    def test_vectors_beyond_the_top_get_no_gradient(self):
        site = small_linear()
        delta = kinds["vector-bank"](vectors=5, length=8, rank=2)
        p = trained(delta, site)
        p.logits_a.requires_grad_()
        delta.weight(p, site.weight).sum().backward()
        assert (p.logits_a.grad != 0).sum(-1).max() == 2
        whole = kinds["vector-bank"](vectors=5, length=8, rank=2, top=5)
        mixed = torch.softmax(p.logits_a.detach(), -1) @ p.bank
        close(whole.factors(p)[0].detach(), mixed.flatten(-2))


class TestShardPool:
    def test_the_count_does_not_depend_on_rank_and_shards(self):
        for rank, shards in ((4, 1), (8, 4)):
            graft = grafted(stack(), "shard-pool", rank=rank, shards=shards, pool_rank=2, private_rank=1)
            assert graft.num_trainable == COUNTS["shard-pool"]

    def test_pairs_are_dissociated_and_a_site_takes_none_again_before_all_were(self):
        graft = grafted(stack(), "shard-pool", rank=7, pool_rank=2, private_rank=1, shards=2)
        for slot in graft.all_slots:
            assert len(slot.index_a.unique()) == slot.pool_a.shape[0] == 12
            assert not torch.equal(slot.index_a, slot.index_b)

    def test_private_vectors_alone_are_a_low_rank_change(self):
        site = small_linear()
        p = trained(kinds["shard-pool"](rank=3, private_rank=3, pool_rank=0, alpha=6.0), site)
        changed = kinds["shard-pool"](rank=3, private_rank=3, pool_rank=0, alpha=6.0).weight(p, site.weight)
        close(changed, site.weight + 2 * p.own_b.t() @ p.own_a)

    def test_a_pool_that_nothing_uses_is_refused(self):
        with pytest.raises(ValueError, match="a pool has a use"):
            kinds["shard-pool"](rank=2, private_rank=2)


def test_stacked_changes_of_shared_factors_have_low_tucker_ranks():
    graft = grafted(stack(), "shared-low-rank", rank=2)
    changes = torch.stack([_change(slot) for slot in graft.all_slots])
    assert torch.linalg.matrix_rank(changes.flatten(0, 1), tol=1e-4) == 2
    assert torch.linalg.matrix_rank(changes.transpose(0, 1).flatten(1), tol=1e-4) == 2
    site = small_linear()
    delta = kinds["shared-low-rank"](rank=2, alpha=6.0)
    p = trained(delta, site)
    p.core = torch.eye(2).double()
    close(delta.weight(p, site.weight), site.weight + 3 * p.b @ p.a)


def _change(slot: Slot) -> Tensor:
    a, b = slot.delta.factors(slot)
    return (b @ a).detach()


class TestTensorProduct:
    def test_columns_are_sums_of_kronecker_products(self):
        w = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
        expected = sum(torch.kron(w[0, i, :, 1], w[1, i, :, 1]) for i in range(3))
        close(expanded(w)[:, 1], expected)

    def test_counts(self):
        site = small_linear()  # 16 x 24
        assert kinds["tensor-product"](rank=3, order=2, terms=5).count(site) == 2 * 5 * 3 * (4 + 5)
        assert kinds["tensor-product"](rank=3, order=3, terms=2).count(site) == 3 * 2 * 3 * (3 + 3)


class TestSubspace:
    def source(self, folder: Path, seed: int, rank: int = 2, kind: str = "low-rank") -> str:
        settings = {"rank": rank} if kind == "low-rank" else {}
        return str(grafted(stack(), kind, seed=seed, **settings).save(folder / f"{kind}{seed}"))

    def test_former_changes_lie_in_the_subspace(self, tmp_path):
        paths = (self.source(tmp_path, 1), self.source(tmp_path, 2))
        model = stack()
        graft = grafted(model, "subspace", rank=2, components=4, grafts=paths)
        assert graft.num_trainable == LAYERS * 2 * 4 * 2
        other = stack()
        former = fg.load(paths[1], other)
        for slot, old in zip(graft.all_slots, former.all_slots, strict=True):
            close(slot.basis_a @ slot.basis_a.t(), torch.eye(4), 1e-5)
            with torch.no_grad():
                slot.loadings_a.copy_(old.a @ slot.basis_a.t())
                slot.loadings_b.copy_(slot.basis_b.t() @ (old.delta.scale * old.b))
        close(model(X), other(X), 1e-5)
        saved = graft.save(tmp_path / "own")
        for path in paths:
            for file in Path(path).iterdir():
                file.unlink()
        again = stack()
        fg.load(saved, again)
        close(again(X), model(X), 1e-6)

    def test_directions_that_are_missing_are_random(self, tmp_path):
        graft = grafted(stack(), "subspace", components=6, grafts=Path(self.source(tmp_path, 1)))
        for slot in graft.all_slots:
            close(slot.basis_b.t() @ slot.basis_b, torch.eye(6), 1e-5)

    def test_grafts_that_do_not_fit_are_refused(self, tmp_path):
        path = self.source(tmp_path, 1)
        with pytest.raises(BaseMismatch):
            grafted(stack(LAYERS + 1), "subspace", grafts=(path,))
        partly = fg.graft(stack(), {"parts": [{"where": {"name": "layers.0"}, "what": "low-rank"}], "heads": "none"})
        with torch.no_grad():
            partly.all_slots[0].b.fill_(1)
        with pytest.raises(SiteError, match="changes nothing at 'layers.1'"):
            grafted(stack(), "subspace", grafts=(str(partly.save(tmp_path / "partly")),))
        with pytest.raises(RecipeError, match="no low-rank factors"):
            grafted(stack(), "subspace", grafts=(self.source(tmp_path, 1, kind="bias"),))
        with pytest.raises(StoreError):
            grafted(stack(), "subspace", grafts=(str(tmp_path / "nowhere"),))


class TestFrozenTensors:
    """Random frozen tensors of equal sites are one, whatever happens to the model."""

    def held(self, model: nn.Module) -> set[int]:
        return {b.data_ptr() for m in model.modules() if isinstance(m, Slot) for _, b in m.named_buffers()}

    @pytest.mark.parametrize("kind", ["random-basis", "random-sum", "fourier", "basis-low-rank"])
    def test_are_held_once(self, kind):
        model = stack()
        graft = grafted(model, kind)
        own = len(list(graft.all_slots[0].buffers()))
        expected = model(X)
        assert len(self.held(model)) == own
        grafted(model, kind, seed=1).detach()
        twin = copy.deepcopy(model)
        assert len(self.held(twin)) == own
        assert not self.held(twin) & self.held(model)
        assert len(self.held(twin.double())) == own
        assert len(self.held(twin.float())) == own
        close(twin(X), expected, 1e-6)

    def test_differ_where_settings_or_shapes_do(self):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8))
        grafted(model, "random-basis", rank=4)
        assert len(self.held(model)) == 4
        grafted(model, "random-basis", rank=4, seed=0)
        assert len(self.held(model)) == 4
        grafted(model, "random-basis", rank=5)
        assert len(self.held(model)) == 8

    def test_live_no_longer_than_a_change_that_holds_them(self):
        model = stack()
        graft = grafted(model, "random-basis")
        kept = graft._stack.working
        graft.detach()
        del graft
        assert all(tensor() is None for held in kept._held.values() for tensor in held.values())
