"""Pixels from whatever a table holds for an image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from finegraft.errors import DataError


@dataclass(frozen=True)
class PlainImages:
    """Image processor for a base that brings none: resize, scale to [0, 1], then (pixel - mean) / std.

    Args:
        size: height and width in pixels.
        channels: 3 for colour (default), 1 for grey.
        mean: subtracted from each channel; default 0.5.
        std: what each channel is divided by; default 0.5.
    """

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __call__(
        self, images: Sequence[Image.Image], **_: Any
    ) -> dict[str, Float[Tensor, "image channel height width"]]:
        """Pixels of all images, under the name that Transformers' image models take."""
        mode = "L" if self.channels == 1 else "RGB"
        sized = [image.convert(mode).resize(self.size[::-1], Image.Resampling.BILINEAR) for image in images]
        arrays = [np.array(image).reshape(*self.size, self.channels) for image in sized]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return {"pixel_values": ((pixels - mean) / std).contiguous()}


def _bytes(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "ui" or array.min() < 0 or array.max() > 255:
        raise DataError(f"an image array holds {array.dtype} values, where whole numbers from 0 to 255 are needed")
    return array.astype(np.uint8)


def as_image(value: Any) -> Image.Image:
    """A colour image from an image, encoded bytes, a path, or an array (height, width[, channel]) of 0..255.

    Raises:
        DataError: none of these, or a file that cannot be decoded.
    """
    try:
        if isinstance(value, bytes):
            value = Image.open(io.BytesIO(value))
        elif isinstance(value, str):
            value = Image.open(value)
        elif isinstance(value, (list, np.ndarray)):
            value = Image.fromarray(_bytes(value))
        if isinstance(value, Image.Image):
            return value.convert("RGB")
    except (UnidentifiedImageError, OSError, TypeError, ValueError) as error:
        raise DataError(f"an image cannot be read: {error}") from error
    raise DataError(f"a {type(value).__name__} is no image; images are image files, their bytes, or arrays of 0..255")
