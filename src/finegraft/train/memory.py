"""Peak memory of this process, and errors that mean there was none left."""

from __future__ import annotations

import sys

import torch

if sys.platform != "win32":
    import resource

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "defaultcpuallocator")


def peak_memory() -> dict[str, int]:
    """Highest memory in use so far, in bytes.

    Returns:
        ``process``: the peak resident set of this process (absent where the system does not tell);
        ``cuda``: the peak allocation on the current CUDA device (absent without one).
    """
    peaks: dict[str, int] = {}
    if sys.platform != "win32":
        unit = 1 if sys.platform == "darwin" else 1024
        peaks["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peaks["cuda"] = torch.cuda.max_memory_allocated()
    return peaks


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a processor or on an accelerator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
