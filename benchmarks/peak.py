"""Peak memory of one way to train, in a process of its own: ``python benchmarks/peak.py llama-91m "PEFT LoRA"``.

Prints JSON: ``over_weights``, the bytes by which the resident set peaks during two steps over what it is with the
base loaded and a forward pass without gradients done, and ``trained``, the numbers that train. So the figure holds
the attached tensors, activations, gradients and optimizer state, and whatever else a way to train allocates.

Three things make the resident set say what lives, not what was once touched: all libraries and code paths are
warmed up on a tiny model first, large allocations go back to the system at once (see ``ENVIRONMENT``), and the
high-water mark is reset before the measured steps. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STEPS = 2


def peak_of(shape: str, contender: str) -> dict[str, int]:
    """Run :func:`measure` in a fresh process and return what it printed.

    Raises:
        RuntimeError: the process failed; the message carries the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, __file__, shape, contender],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring {contender!r} on {shape!r} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape_name: str, contender_name: str) -> dict[str, int]:
    """Peak bytes over weights of two steps, in this process."""
    import torch

    import structured_contenders
    from contenders import NAMED, Training, starter
    from shapes import BERT_TINY, LLAMA_TINY, SHAPES

    shape, contender = SHAPES[shape_name], {**structured_contenders.NAMED, **NAMED}[contender_name]
    starter(BERT_TINY if shape.head else LLAMA_TINY)(contender).step()
    base, batch = shape.build(), shape.batch()
    with torch.no_grad():
        base(**batch)
    before = _settle()
    training = Training(contender, shape, base, batch)
    for _ in range(STEPS):
        training.step()
    return {"over_weights": _status("VmHWM") - before, "trained": training.trained}


def _settle() -> int:
    """Give back what is free, forget the old peak, and say how many bytes are resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; peak memory needs Linux")


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:3])))
