"""Images in every form that a table may hold them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from finegraft.data.images import PlainImages, as_image
from finegraft.errors import DataError

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def test_all_forms_give_the_same_colours(tmp_path):
    image, file = Image.fromarray(PIXELS), io.BytesIO()
    image.save(file, "PNG")
    image.save(tmp_path / "a.png")
    for form in (image, file.getvalue(), str(tmp_path / "a.png"), PIXELS, PIXELS.tolist()):
        assert np.array_equal(np.asarray(as_image(form)), PIXELS)


def test_grey_becomes_colour():
    assert np.asarray(as_image(PIXELS[:, :, 0])).shape == (4, 4, 3)


@pytest.mark.parametrize("value", [b"no image", "nowhere.png", PIXELS / 255, PIXELS.astype(int) * 9, 7, None])
def test_what_is_no_image_is_an_error(value):
    with pytest.raises(DataError, match="image"):
        as_image(value)


def test_plain_pixels_are_normalised_by_channel():
    plain = PlainImages((4, 4), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    pixels = plain([as_image(PIXELS)])["pixel_values"]
    expected = (PIXELS / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 1.0, 2.0])
    assert pixels.dtype == torch.float32
    assert np.allclose(pixels[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_images_are_brought_to_size_as_height_and_width():
    image = as_image(np.zeros((10, 20, 3), np.uint8))
    assert PlainImages((6, 8), channels=1)([image])["pixel_values"].shape == (1, 1, 6, 8)
