"""How long it takes to attach each method, on one large layer and on the shapes of a language model of a billion.

    python benchmarks/attach_time.py                       every method on a layer of 8192 x 2048
    python benchmarks/attach_time.py --model lora pissa    these methods on the whole model, random bfloat16 weights

The model has the layers of Llama 3.2 1B: 16 blocks of width 2048 with 8192 inside, 8 of 32 heads for keys and values.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import finegraft as fg
from finegraft.errors import FinegraftError
from finegraft.registry import methods

WIDTH, INNER, KEYS, BLOCKS, VOCABULARY = 2048, 8192, 512, 16, 128256


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, KEYS, bias=False) for _ in range(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), FeedForward()


class Model(nn.Module):
    """The layers alone: attaching calls none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))


def whole_model() -> nn.Module:
    """The model in bfloat16; blocks hold copies of the same random numbers, which cost less time to make."""
    with torch.device("meta"):
        model = Model().bfloat16()
    model.to_empty(device="cpu")
    drawn: dict[torch.Size, torch.Tensor] = {}
    for p in model.parameters():
        if p.shape not in drawn:
            rng = torch.Generator().manual_seed(len(drawn))
            drawn[p.shape] = torch.empty(p.shape, dtype=p.dtype).normal_(0, 0.02, generator=rng)
        p.data.copy_(drawn[p.shape])
    return model


def one_layer() -> nn.Module:
    """One feed-forward layer of that model."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, INNER, bias=False).bfloat16())


def seconds(model: nn.Module, method: str) -> tuple[float, float]:
    """On the clock and of all processors, for attaching a method to a model that carries nothing."""
    start, busy = time.perf_counter(), time.process_time()
    graft = fg.graft(model, method)
    taken = time.perf_counter() - start, time.process_time() - busy
    graft.detach()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="all that fit where none is named")
    parser.add_argument("--model", action="store_true", help="the whole model, not one layer")
    chosen = parser.parse_args()
    fg.graft(nn.Sequential(nn.Linear(2, 2)), "lora", rank=1).detach()  # what is imported on first use counts for none
    model = whole_model() if chosen.model else one_layer()
    for method in chosen.methods or list(methods):
        try:
            clock, busy = seconds(model, method)
            print(f"{method:28s} {clock:8.2f} s {busy:8.2f} s of processors", flush=True)
        except FinegraftError as error:
            print(f"{method:28s} not here: {str(error)[:80]}", flush=True)


if __name__ == "__main__":
    main()
