"""Starts of low-rank factors, against what their papers say they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finegraft.errors import SiteError
from finegraft.grafting.make import graft
from finegraft.locate.find import sites
from finegraft.registry import inits

OUT, IN, RANK, SCALE = 9, 7, 3, 0.5


@pytest.fixture
def site():
    torch.manual_seed(0)
    (found,) = sites(nn.Sequential(nn.Linear(IN, OUT))).where(type="linear")
    return found


def start(name, site, seed=0):
    return inits[name](site, RANK, SCALE, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [n for n in inits if inits[n].needs is None])
def test_shapes_and_seeds(name, site):
    a, b = start(name, site)
    assert (a.shape, b.shape) == ((RANK, IN), (OUT, RANK))
    again, _ = start(name, site)
    assert torch.equal(a, again)


@pytest.mark.parametrize("name", [n for n in inits if not inits[n].takes_from_weight])
def test_b_starts_at_zero_and_a_by_chance(name, site):
    a, b = start(name, site)
    assert not b.any()
    assert not torch.equal(a, start(name, site, seed=1)[0])


def test_kaiming_starts_as_a_linear_layer_does(site):
    a, _ = inits["kaiming"](site, 500, SCALE, torch.Generator().manual_seed(0))
    assert a.abs().max() <= IN**-0.5
    assert abs(a.std() - IN**-0.5 / 3**0.5) < 0.01


def test_gaussian_has_deviation_one_over_rank(site):
    a, _ = inits["gaussian"](site, 400, SCALE, torch.Generator().manual_seed(0))
    assert abs(a.std() * 400 - 1) < 0.05


def test_orthonormal_rows(site):
    a, _ = start("orthonormal", site)
    torch.testing.assert_close(a @ a.T, torch.eye(RANK))


def test_pissa_takes_the_best_approximation_split_evenly(site):
    a, b = start("pissa", site)
    u, s, vh = torch.linalg.svd(site.weight)
    torch.testing.assert_close(SCALE * b @ a, u[:, :RANK] * s[:RANK] @ vh[:RANK])
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_olora_takes_orthonormal_columns(site):
    a, b = start("olora", site)
    torch.testing.assert_close(b.T @ b, torch.eye(RANK))
    torch.testing.assert_close(b.T @ site.weight, a)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_experts_are_decomposed_one_by_one(name):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(4, OUT, IN))

    (site,) = sites(Experts()).where(type="tensor")
    a, b = start(name, site)
    assert (a.shape, b.shape) == ((4, RANK, IN), (4, OUT, RANK))
    for expert in range(4):
        (alone,) = sites(nn.Sequential(nn.Linear(IN, OUT))).where(type="linear")
        with torch.no_grad():
            alone.parameter.copy_(site.weight[expert])
        one_a, one_b = start(name, alone)
        torch.testing.assert_close(b[expert] @ a[expert], one_b @ one_a)


def test_unknown_init_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown init 'pisa'; did you mean 'pissa'\?"):
        graft(nn.Sequential(nn.Linear(8, 8)), "lora", init="pisa")


def test_integer_weights_cannot_be_decomposed():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SiteError, match=r"init 'pissa' decomposes the weight, but '0' holds torch\.int8 numbers"):
        graft(model, "pissa", rank=2)
