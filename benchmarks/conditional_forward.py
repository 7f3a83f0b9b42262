"""What a forward pass costs in which half of the tokens take the short path: CoDA and DyT beside the same adapters.

    python benchmarks/conditional_forward.py          # the 91M shape; writes results/conditional_forward.md
    python benchmarks/conditional_forward.py --quick  # a tiny model: does it run?

One computing thread, processor time, no gradients; contenders take turns, and ratios are of one round. DyT's gates are
set so that half of them open, as its penalty on their rate makes them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import finegraft as fg
from shapes import LLAMA, LLAMA_TINY, Shape
from tables import heading, table

RESULTS = Path(__file__).parent / "results" / "conditional_forward.md"
ADAPTER = {"kind": "bottleneck", "placement": "parallel", "norm": True, "width": 64}
BESIDE_BLOCKS = {"parts": [{"where": {"role": "block"}, "what": ADAPTER}], "heads": "none"}
REFERENCE = "adapters beside blocks, all tokens through"


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = _options(given)
    torch.set_num_threads(1)
    shape = LLAMA_TINY if options.quick else LLAMA
    contenders = _contenders(shape)
    times = _take_turns({name: run for name, (_, run) in contenders.items()}, options.rounds)
    page = heading("Half of the tokens on the short path", "conditional_forward.py", given)
    page += f"\n{shape.words}; median of {options.rounds} rounds\n\n{_table(contenders, times)}\n"
    print(page)
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        out.write_text(page)
    return 0


def _options(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Forward passes with half of the tokens on the short path.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after two to warm up")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table here")
    return parser.parse_args(given)


def _contenders(shape: Shape) -> dict[str, tuple[str, Callable[[], Any]]]:
    """By name, which share of the tokens goes through the base, and a forward pass."""
    inputs = {name: tensor for name, tensor in shape.batch().items() if name != "labels"}

    def forward(recipe: Any, prepare: Callable[[Any], None] = lambda graft: None) -> Callable[[], Any]:
        model = shape.build().eval()
        if recipe is not None:
            graft = fg.graft(model, recipe)
            _fill(graft)
            prepare(graft)
            _opened_by_half(graft, lambda: model(**inputs))
        return lambda: model(**inputs)

    def all_open(graft: Any) -> None:
        for slot in _gates(graft):
            slot.score.data.zero_()

    return {
        "the base": ("all", forward(None)),
        REFERENCE: ("all", forward(BESIDE_BLOCKS)),
        "coda": ("half, of each block", forward("coda")),
        "dyt, all gates open": ("all", forward("dyt", all_open)),
        "dyt": ("half, of each FFN", forward("dyt")),
    }


@torch.no_grad()
def _fill(graft: Any) -> None:
    """Something like training: no map stays at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in graft.parameters():
        if not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def _gates(graft: Any) -> list[Any]:
    return [slot for slot in graft.all_slots if slot.delta.kind == "token-router" and slot.delta.choice == "threshold"]


@torch.no_grad()
def _opened_by_half(graft: Any, run: Callable[[], Any]) -> None:
    """Shift the gates that look at tokens by the median of their logits, block by block."""
    hooks = []
    for slot in _gates(graft):
        entry: nn.Module = graft.placement_of(slot).site.entry

        def shift(module: nn.Module, args: tuple, own: Any = slot) -> None:
            if own.score.any():
                own.offset.fill_(-float((args[0] @ own.score).median()))

        hooks.append(entry.register_forward_pre_hook(shift))
    run()
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def _take_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(2 + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            began = time.process_time()
            runs[name]()
            if turn >= 2:
                times[name].append(time.process_time() - began)
    return times


def _table(contenders: dict[str, tuple[str, Any]], times: dict[str, list[float]]) -> str:
    def ratio(name: str, other: str) -> str:
        return f"{median(a / b for a, b in zip(times[name], times[other], strict=True)):.2f}"

    head = ["", "tokens through the base", "forward, ms", "of the base", "of all tokens through"]
    whole = {"coda": REFERENCE, "dyt": "dyt, all gates open"}
    rows = [
        [
            name,
            share,
            f"{1000 * median(times[name]):.0f}",
            ratio(name, "the base"),
            ratio(name, whole[name]) if name in whole else "",
        ]
        for name, (share, _) in contenders.items()
    ]
    return table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
