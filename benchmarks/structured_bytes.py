"""Bytes that each structured method keeps from forward to backward, beside PEFT's version of it.

    python benchmarks/structured_bytes.py                     # some minutes; writes results/structured_bytes.md
    python benchmarks/structured_bytes.py --only vera --out F # some of them
    python benchmarks/structured_bytes.py --check             # exit status 1 where a target is missed

The counts are exact and the same on every machine (``finegraft.testing.memory``), on a small Llama in bf16. They are
relative to the floor, what the gradient's way through the untouched base takes. Counted are storages held by anyone,
which takes in all that autograd saves.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

from measure import Kept, kept_for_backward
from shapes import LLAMA_BF16, LLAMA_TINY_BF16, Shape
from structured_contenders import PAIRS, Pair
from tables import heading, table

RESULTS = Path(__file__).parent / "results" / "structured_bytes.md"
MOST, MEDIAN = 1.0, 0.7  # of PEFT's


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    shape = LLAMA_TINY_BF16 if options.quick else LLAMA_BF16
    rows: dict[str, tuple[Kept, Kept | None]] = {}
    failures = []
    for name in options.only or PAIRS:
        # One method that fails must not cost the counts of the others
        try:
            rows[name] = _counted(PAIRS[name], shape)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
            print(f"failed: {failures[-1]}", file=sys.stderr)
    ratios = {name: ours.held / theirs.held for name, (ours, theirs) in rows.items() if theirs}
    given = sys.argv[1:] if arguments is None else arguments
    page = "\n\n".join([heading("Bytes kept for backward", "structured_bytes.py", given).strip(), *_page(shape, rows)])
    page += f"\n\n{_verdict(ratios)}\n" + "".join(f"\nNot counted: {failure}\n" for failure in failures)
    print(page)
    if options.out or not (options.only or options.quick):
        (options.out or RESULTS).write_text(page)
    met = not ratios or (max(ratios.values()) <= MOST and median(ratios.values()) <= MEDIAN)
    return int(options.check and not (met and not failures))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bytes kept for backward by structured methods, beside PEFT's.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=sorted(PAIRS), metavar="NAME", help="only these methods")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"write the table here; default, if whole: {RESULTS}")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    return parser.parse_args(arguments)


def _counted(pair: Pair, shape: Shape) -> tuple[Kept, Kept | None]:
    (ours,) = kept_for_backward([pair.ours], shape)[1:]
    if pair.theirs is None:
        return ours, None
    try:
        (theirs,) = kept_for_backward([pair.theirs], shape)[1:]
    except RuntimeError as error:
        print(f"{pair.theirs.name} does not run on this shape: {error}", file=sys.stderr)
        return ours, None
    return ours, theirs


def _page(shape: Shape, rows: dict[str, tuple[Kept, Kept | None]]) -> list[str]:
    head = ["", "kept, MB", "of the floor", "PEFT's, MB", "of the floor", "of PEFT's"]
    lines = []
    for name, (ours, theirs) in rows.items():
        own = [f"{ours.held / 1e6:.2f}", f"{ours.held_ratio:.3f}"]
        other = ["", "", ""]
        if theirs:
            other = [f"{theirs.held / 1e6:.2f}", f"{theirs.held_ratio:.3f}", f"{ours.held / theirs.held:.3f}"]
        lines.append([name, *own, *other])
    return [
        f"{shape.words}. PEFT with its defaults, which keep what it trains in fp32, as finegraft does.",
        table(head, lines),
    ]


def _verdict(ratios: dict[str, float]) -> str:
    if not ratios:
        return "None of these is in PEFT."
    above = [name for name, ratio in ratios.items() if ratio > MOST]
    middle = median(ratios.values())
    return (
        f"Of {len(ratios)} methods that PEFT has too, {len(above)} keep more than PEFT's"
        f"{' (' + ', '.join(above) + ')' if above else ''}; the median is {middle:.3f} of PEFT's (at most {MEDIAN})."
    )


if __name__ == "__main__":
    sys.exit(main())
