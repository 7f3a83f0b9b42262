"""The start of low-rank factors in the least singular triplets of the weight."""

from __future__ import annotations

import torch

from finegraft.inits.decompose import rounded
from finegraft.inits.factors import Factors, factor_init, split_evenly
from finegraft.locate.site import Site


@factor_init("minor", takes_from_weight=True)
def minor(site: Site, rank: int, scale: float, rng: torch.Generator) -> Factors:
    """The last singular triplets, their values split evenly (MiLoRA, Wang et al. 2024, arXiv:2406.09044)."""
    # The least triplets of a trained weight lie too close for iterations to tell them apart.
    u, s, vh = torch.linalg.svd(rounded(site), full_matrices=False)
    return split_evenly((u[..., -rank:], s[..., -rank:], vh[..., -rank:, :]), scale, torch.float64)
