"""The structured methods of the catalogue beside PEFT's, each pair with the same settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor

from contenders import PEFT_LORA, Contender, PeftSettings, Sizes
from finegraft.registry import methods


@dataclass(frozen=True)
class Pair:
    """A method, and what PEFT has of it.

    Attributes:
        ours: the method, with settings that PEFT's can have too.
        theirs: PEFT's; None where it has none.
    """

    ours: Contender
    theirs: Contender | None = None

    @property
    def reference(self) -> Contender:
        """What the method is compared with: PEFT's, else PEFT LoRA."""
        return self.theirs or PEFT_LORA


@dataclass(frozen=True)
class _Peft:
    """PEFT's configuration for a method.

    Attributes:
        config: its class.
        settings: keywords of it, or a function that gives them for the sizes of layers.
        equal: whether it trains just as many numbers.
        ours: settings of our method that are no defaults.
    """

    config: str
    settings: PeftSettings = field(default_factory=dict)
    equal: bool = True
    ours: dict[str, Any] = field(default_factory=dict)


def _widest_circulants(sizes: Sizes) -> dict[str, Any]:
    return {"block_size": 1, "block_size_pattern": {name: math.gcd(*size) for name, size in sizes.items()}}


_LORA = {"r": 8, "lora_alpha": 16}
_BANK = {"num_vectors": 256, "vector_length": 128, "topk": 2}
_PEFT = {
    "lora": _Peft("LoraConfig", _LORA),
    "rslora": _Peft("LoraConfig", {**_LORA, "use_rslora": True}),
    "lora+": _Peft("LoraConfig", _LORA),
    "lora-fa": _Peft("LoraConfig", {**_LORA, "frozen": "lora_A"}),
    "dora": _Peft("LoraConfig", {**_LORA, "use_dora": True}),
    "pissa": _Peft("LoraConfig", {"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"}),
    "olora": _Peft("LoraConfig", {"r": 8, "lora_alpha": 8, "init_lora_weights": "olora"}),
    "hira": _Peft("HiraConfig", {"r": 32}),
    "hra": _Peft("HRAConfig", {"r": 8}),
    "oft": _Peft("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": False}),
    # PEFT trains all numbers of a skew block.
    "boft": _Peft("BOFTConfig", {"boft_block_size": 8, "boft_n_butterfly_factor": 2}, equal=False),
    "loha": _Peft("LoHaConfig", {"r": 8, "alpha": 8}),
    "lokr": _Peft("LoKrConfig", {"r": 8, "alpha": 8}),
    "c3a": _Peft("C3AConfig", _widest_circulants),
    "fourierft": _Peft("FourierFTConfig", {"n_frequency": 1000, "scaling": 150.0}),
    "vera": _Peft("VeraConfig", {"r": 256}),
    "randlora": _Peft("RandLoraConfig", {"r": 32}),
    "vb-lora": _Peft("VBLoRAConfig", {"r": 4, **_BANK}, ours={"length": 128}),
    "adalora": _Peft("AdaLoraConfig", {"init_r": 12, "target_r": 8, "total_step": 1000}, equal=False),
    "glora": _Peft("GloraConfig", {"r": 8, "config_C": "vector", "config_D_E": "vector"}, equal=False),
}
# fmt: off
NAMES = (
    "lora", "rslora", "lora+", "lora-fa", "lora-dropout", "allora", "ba-lora", "dylora", "adalora", "increlora",
    "triadaptlora", "aflora", "melora", "mos", "vb-lora", "eigenlorax", "lora-xs", "lora-sb", "dora", "edora", "loldu",
    "pissa", "olora", "corda", "corda-ipm", "corda-kpm", "sorsa", "svft", "svft-banded", "svft-random", "svft-top",
    "spectral-adapter", "spectral-adapter-rotation", "hut", "hra", "goft", "qgoft", "oft", "boft", "surm",
    "surm-circulant", "surm-toeplitz", "surm-kronecker", "monarch", "pixelated-butterfly", "loretta-rep", "lotr",
    "flora", "lokr", "diffusekrona", "loha", "glora", "hydra", "tlora", "orthogonal-adaptation", "pego", "gs-lora",
    "mtlora", "petalface", "relaxed-recursive", "weight-compander", "snnk", "vera", "fourierft", "randlora", "c3a",
    "hira",
)
# fmt: on
"""Structured methods by families; those that the catalogue lacks are left out."""


def _pair(name: str) -> Pair:
    known = _PEFT.get(name)
    if known is None:
        return Pair(Contender(name, "finegraft", name))
    theirs = Contender(f"PEFT {name}", "peft", known.config, known.settings)
    return Pair(Contender(name, "finegraft", name, known.ours, theirs.name if known.equal else None), theirs)


class _BlockDiagonal:
    """Stands in for PEFT's CUDA extension, without which its BOFT has a single factor."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


def _let_peft_have_butterflies() -> None:
    layer: Any = peft.tuners.boft.layer
    layer.get_fbd_cuda, layer.FastBlockDiag = (lambda: True), _BlockDiagonal


_let_peft_have_butterflies()
PAIRS = {name: _pair(name) for name in NAMES if name in methods}


def contenders() -> Iterator[Contender]:
    """Everyone in all pairs."""
    for pair in PAIRS.values():
        yield pair.ours
        if pair.theirs:
            yield pair.theirs


NAMED = {contender.name: contender for contender in contenders()}
