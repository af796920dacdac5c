"""Pictures and bars of the demo, and pictures from users."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from hf_robust.demo.comparison import Outcome
from hf_robust.demo.rendering import amplification, bars, figures, read_picture, to_picture


def outcome(change: float = 8 / 255, names: tuple[str, ...] | None = None, classes: int = 6) -> Outcome:
    image = torch.full((3, 4, 4), 0.5)
    before, after = torch.eye(classes)[2] * 0.9 + 0.01, torch.eye(classes)[4] * 0.7 + 0.02
    return Outcome(image, image + change, before, after, names)


def test_a_picture_of_the_right_size_is_taken_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image, note = read_picture(Image.fromarray(pixels), 8)
    assert note == "" and torch.equal((image * 255).round(), torch.from_numpy(pixels).permute(2, 0, 1).float())


def test_another_size_is_resized_and_said_so():
    image, note = read_picture(Image.new("RGB", (64, 48), "red"), 8)
    assert image.shape == (3, 8, 8) and image[0].min() == 1 and image[1:].max() == 0
    assert note == (
        "The picture has 64 \u00d7 48 pixels; its middle was cut out and resized to 8 \u00d7 8, the size the model "
        "takes."
    )
    assert "pixels; it was resized to 8" in read_picture(Image.new("RGB", (64, 64)), 8)[1]
    assert read_picture(Image.new("RGB", (64, 48)), None)[0].shape == (3, 48, 64)


def test_grey_transparent_and_turned_pictures():
    assert read_picture(Image.new("L", (4, 4), 51), 4)[0].unique().tolist() == pytest.approx([0.2])
    assert read_picture(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 4)[0].min() == 1
    turned, file = Image.new("RGB", (4, 8)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(file, "JPEG", exif=exif)
    assert read_picture(Image.open(file), None)[0].shape == (3, 4, 8)


def test_no_picture_is_a_sentence():
    with pytest.raises(ValueError, match="There is no image yet: upload one, or pick one of the examples."):
        read_picture(None, 8)


def test_small_images_are_enlarged_without_blurring_and_large_ones_left():
    pixels = torch.rand(3, 8, 8, generator=torch.manual_seed(0))
    picture = to_picture(pixels)
    assert picture.size == (320, 320) and len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) == 64
    assert to_picture(torch.zeros(3, 400, 600)).size == (600, 400) and to_picture(pixels, 1).size == (8, 8)


def test_the_factor_is_stated_and_grey_is_no_change():
    assert amplification([outcome(8 / 255), outcome(1 / 255)]) == 10 and amplification([outcome(0.0)]) == 1
    text = figures(outcome(), 10)
    assert "<figcaption>change \u00d7 10</figcaption>" in text and text.count("<figure>") == 3
    sources = re.findall(r"data:image/png;base64,([^']+)'", text)
    clean, change, attacked = (np.asarray(Image.open(io.BytesIO(base64.b64decode(s)))) for s in sources)
    assert clean.max() == 128 and attacked.max() == 136 and change.min() == round((0.5 + 80 / 255) * 255)
    unchanged = re.findall(r"data:image/png;base64,([^']+)'", figures(outcome(0.0), 1))[1]
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(unchanged)))).max() == 128


def test_bars_show_the_likeliest_classes_first_and_escape_names():
    names = ("a", "b", "<script>", "d", "e", "f")
    text = bars(outcome(names=names))
    rows = re.findall(r"<th title=\"([^\"]*)\"", text)
    assert rows[:2] == ["&lt;script&gt;", "e"] and len(rows) == 4 and "<script>" not in text
    assert "width:91.0%" in text and "72 %" in text
    assert bars(outcome(classes=6)).count("<th") == 4
