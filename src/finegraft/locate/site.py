"""One place of a base model where something can change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from finegraft.quantised.stored import dense


@dataclass(frozen=True, eq=False)
class Site:
    """A layer, a bare parameter tensor, the output of a sublayer, or an attention call.

    Attributes:
        name: the module's path for a layer or an attention call, the full parameter name for a bare
            tensor, ``"<block>.attn"``, ``"<block>.cross_attn"`` or ``"<block>.ffn"`` for a sublayer.
        kind: ``"layer"``, ``"tensor"``, ``"sublayer"``, ``"block"``, ``"network"``, ``"attention"`` or
            ``"input"``.
        type: ``"linear"``, ``"conv"``, ``"embedding"``, ``"norm"``, ``"tensor"``, ``"sublayer"`` or
            ``"attention"``.
        role: what the site does in the network; see :data:`finegraft.locate.roles.ROLES`.
        layer: index of the block in its stack, ``None`` outside of any stack.
        module: the layer; for a bare tensor the module that holds it; for a sublayer the module whose
            output is the sublayer's output, before the residual is added.
        tensor: attribute name of the main tensor in ``module``; empty where there is none.
        op: how the main tensor computes; ``None`` where there is none.
        shape: natural shape of the main tensor; empty where there is none.
        aliases: other ``(name, module, attribute)`` that hold the very same parameter.
        entry: for a sublayer, the module whose input is the sublayer's input. Where only bare tensors compute
            it (experts, ``nn.MultiheadAttention``), ``entry`` and ``module`` are the module that reads them,
            and the output may be a tuple that begins with the sublayer's output.
        block: path of the block that ``layer`` counts, empty outside of any stack.
        stack: name of that block's stack, the same for all its blocks, numbers written as ``#``.
        coupling: its part in the heads or channels of its block (:class:`~finegraft.locate.coupling.Coupling`);
            ``None`` outside of attentions and FFNs.
        chosen: the units that a selector chose here, for kinds that train a selection.
        peers: the sites of its recipe's part that have the same changes, it among them; empty where it stands alone.
        sources: low-rank factors ``(A, B)`` of other grafts' changes here, for starts that look at them.
        statistic: what calibration batches gave here, for starts that look at data.
        input: for the input of a stack, the way of a sequence through it (:class:`~finegraft.locate.inputs.Way`).
        network: for a whole stack of blocks, what they are like (:class:`~finegraft.locate.networks.Network`).
        before: gives the main tensor as it was before changes were written into it; ``None`` where none are.
    """

    name: str
    kind: str
    type: str
    role: str
    layer: int | None
    module: nn.Module
    tensor: str
    op: Any
    shape: tuple[int, ...]
    aliases: tuple[tuple[str, nn.Module, str], ...] = ()
    entry: nn.Module | None = None
    block: str = ""
    stack: str = ""
    coupling: Any = None
    chosen: Any = None
    peers: tuple[Site, ...] = ()
    sources: tuple[Any, ...] = ()
    statistic: Any = None
    input: Any = None
    network: Any = None
    before: Callable[[], torch.Tensor] | None = None

    @cached_property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the canonical matrix, ``(*batch, out, in)``; ``(1, 1)`` where there is none."""
        if self.op is None:
            return (1, 1)
        return tuple(self.op.matrix(torch.empty(self.shape, device="meta")).shape)

    @property
    def fan_out(self) -> int:
        """Rows of the canonical matrix: outputs of the layer (entries of an embedding table)."""
        return self.matrix_shape[-2]

    @property
    def fan_in(self) -> int:
        """Columns of the canonical matrix: inputs of the layer (width of an embedding)."""
        return self.matrix_shape[-1]

    @property
    def batch(self) -> tuple[int, ...]:
        """Leading dimensions of the canonical matrix: ``(experts,)`` for a stack, else empty."""
        return self.matrix_shape[:-2]

    @property
    def parameter(self) -> torch.Tensor | None:
        """The main tensor, looked up afresh; ``None`` for sublayers and attention calls."""
        return getattr(self.module, self.tensor) if self.tensor else None

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias, ``None`` where it has none."""
        return getattr(self.module, "bias", None) if self.kind == "layer" else None

    @property
    def weight(self) -> torch.Tensor:
        """The main tensor as a canonical matrix ``(*batch, out, in)``, detached; dense where it is quantised."""
        return self.op.matrix(dense(getattr(self.module, self.tensor), self.module).detach())

    @property
    def base_weight(self) -> torch.Tensor:
        """The base's own canonical matrix, whatever stands written in the tensor."""
        return self.weight if self.before is None else self.op.matrix(self.before())

    @property
    def channels(self) -> int:
        """Output channels: the width of what the layer gives."""
        return self.matrix_shape[self.op.out_axis]

    @property
    def inputs(self) -> int:
        """Width of what the layer takes; 0 where that is no vector, as for an embedding."""
        if self.type == "conv":
            groups: Any = self.module.groups
            return self.shape[1] * groups
        return self.fan_in if self.type in ("linear", "tensor", "sublayer", "block", "network") else 0

    @property
    def num_parameters(self) -> int:
        """Numbers in the main tensor and the bias."""
        return sum(t.numel() for t in (self.parameter, self.bias) if t is not None)

    def __repr__(self) -> str:
        return f"Site({self.name!r}, {self.type}, role={self.role}, layer={self.layer}, shape={self.shape})"
