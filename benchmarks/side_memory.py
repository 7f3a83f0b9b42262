"""Memory of training with side networks, beside LoRA: bytes kept for backward, and peak memory over the weights.

    python benchmarks/side_memory.py                # some minutes; writes results/side_memory.md
    python benchmarks/side_memory.py --check        # exit status 1 where a target is missed
    python benchmarks/side_memory.py --kept-only    # the exact counts alone, on any machine

Bytes kept are exact counts (``finegraft.testing.memory``) of storages that anyone holds after a forward pass in
training mode. Peaks come from processes of their own (``peak.py``) and hold gradients and optimizer state as well.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from contenders import PEFT_LORA, SIDE, Contender, starter
from finegraft.testing.memory import held_bytes, saved_bytes
from peak import peak_of
from shapes import BERT_TINY, LLAMA, LLAMA_TINY, MINILM, Shape
from tables import heading, table

RESULTS = Path(__file__).parent / "results" / "side_memory.md"
TARGETED, MOST = "lst", 0.5  # of PEFT LoRA's peak over weights


@dataclass(frozen=True)
class Memory:
    """What one contender takes on a shape.

    Attributes:
        trained: how many numbers train.
        saved: bytes that autograd saves.
        held: bytes that anyone holds.
        peak: bytes over the weights; 0 where not measured.
    """

    trained: int
    saved: int
    held: int
    peak: int


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    shapes = (BERT_TINY, LLAMA_TINY) if options.quick else (MINILM, LLAMA)
    given = sys.argv[1:] if arguments is None else arguments
    parts = [heading("Memory of training with side networks", "side_memory.py", given).strip()]
    met = True
    for shape in shapes:
        rows = {c.name: _memory(c, shape, peaks=not options.kept_only) for c in (PEFT_LORA, *SIDE)}
        parts += [f"{shape.words}.", _table(rows)]
        met &= _ratio(rows) <= MOST
    which = "bytes held" if options.kept_only else "peak over weights"
    parts.append(f"Target: {which} of {TARGETED} at most {MOST} of PEFT LoRA's (rank 8, all linear layers): ")
    parts[-1] += "met." if met else "missed."
    page = "\n\n".join(parts) + "\n"
    print(page)
    if options.out or not (options.quick or options.kept_only):
        (options.out or RESULTS).write_text(page)
    return int(options.check and not met)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory of training with side networks, beside PEFT's LoRA.")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--kept-only", action="store_true", help="leave out peaks, which need Linux and free memory")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"write the table here; default, if whole: {RESULTS}")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if the target is missed")
    return parser.parse_args(arguments)


def _memory(contender: Contender, shape: Shape, *, peaks: bool) -> Memory:
    training = starter(shape)(contender)
    training.step()
    saved, held = (int(count(training.model, training.loss)) for count in (saved_bytes, held_bytes))
    trained = training.trained
    del training
    return Memory(trained, saved, held, peak_of(shape.name, contender.name)["over_weights"] if peaks else 0)


def _ratio(rows: dict[str, Memory]) -> float:
    ours, theirs = rows[TARGETED], rows[PEFT_LORA.name]
    return ours.peak / theirs.peak if theirs.peak else ours.held / theirs.held


def _table(rows: dict[str, Memory]) -> str:
    head = [
        "",
        "numbers trained",
        "saved by autograd, MB",
        "held, MB",
        "of PEFT's",
        "peak over weights, MB",
        "of PEFT's",
    ]
    theirs = rows[PEFT_LORA.name]
    lines = []
    for name, row in rows.items():
        peak = [f"{row.peak / 1e6:.1f}", f"{row.peak / theirs.peak:.2f}"] if theirs.peak else ["", ""]
        kept = [f"{row.saved / 1e6:.2f}", f"{row.held / 1e6:.2f}", f"{row.held / theirs.held:.3f}"]
        lines.append([name, f"{row.trained:,}", *kept, *peak])
    return table(head, lines)


if __name__ == "__main__":
    sys.exit(main())
