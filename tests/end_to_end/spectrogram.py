"""Log-mel spectrograms of short recordings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RATE, WINDOW, HOP = 8000, 256, 128
FRAMES, BANDS = 40, 32
_LOWEST, _FLOOR = 50.0, 1e-4


def log_mel(waveform: Sequence[int]) -> Tensor:
    """A recording of int16 samples at 8 kHz -> (frames, bands), mean 0 and deviation 1, cut or padded to 0.66 s."""
    samples = torch.tensor(waveform, dtype=torch.float32) / 32768
    length = WINDOW + HOP * (FRAMES - 1)
    samples = F.pad(samples[:length], (0, max(0, length - len(samples))))
    window = torch.hann_window(WINDOW)
    power = torch.stft(samples, WINDOW, HOP, window=window, center=False, return_complex=True).abs().square()
    bands = torch.log(_bank() @ power + _FLOOR).t()
    return (bands - bands.mean()) / bands.std()


def _bank() -> Tensor:
    """Triangles at equal steps of pitch: (bands, frequencies)."""
    ends = _mel(torch.tensor([_LOWEST, RATE / 2], dtype=torch.float64))
    pitches = torch.linspace(ends[0].item(), ends[1].item(), BANDS + 2, dtype=torch.float64)
    edges = 700 * (10 ** (pitches / 2595) - 1)
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    low, middle, high = (edges[i : i + BANDS].unsqueeze(1) for i in range(3))
    rise, fall = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rise, fall).clamp_min(0).float()


def _mel(frequency: Tensor) -> Tensor:
    return 2595 * torch.log10(1 + frequency / 700)
