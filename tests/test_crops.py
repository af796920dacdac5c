"""The two views made of crops alone, against torchvision on PIL images with the same parameters.

The sampling and resampling they share with the random views is tested in test_views.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from hf_robust import crops as crops_module
from hf_robust.crops import padded_crop, resized_crop, shift_flip
from hf_robust.views import Views

NAMES = ("padded_crop", "resized_crop")


def make_images(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth patterns with noise, without black pixels: padding can be told from image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, height // 4 + 2, width // 4 + 2, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    return (noisy.clamp(0.02, 1) * 255).round().to(torch.uint8)


def make(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---------------------------------------------------------------------- padded crop
@pytest.mark.parametrize(("size", "padding"), [(32, 4), (9, 1), (6, 0)])
def test_shift_and_flip_equal_torchvision_on_pil(size, padding):
    images = make_images(24, size, size)
    top, left = (torch.randint(0, 2 * padding + 1, (24,), generator=make(seed)) for seed in (1, 2))
    flip = torch.arange(24) % 2 == 1
    found = shift_flip(images, top, left, flip, padding)
    for k, image in enumerate(images):
        expected = F.crop(F.pad(to_pil(image), [padding] * 4), int(top[k]), int(left[k]), size, size)
        assert torch.equal(found[k], from_pil(F.horizontal_flip(expected) if flip[k] else expected)), k


def coordinates(n: int, size: int) -> torch.Tensor:
    """Images whose first two channels are the row and the column, counted from 1; 0 is padding."""
    row, column = torch.meshgrid(torch.arange(1, size + 1), torch.arange(1, size + 1), indexing="ij")
    return torch.stack([row, column, row]).to(torch.uint8).expand(n, -1, -1, -1)


@pytest.mark.parametrize("size", [32, 16])
def test_shifts_are_uniform_over_the_padding_and_every_second_image_is_flipped(size):
    n, padding = 6000, size // 8
    views = (padded_crop(coordinates(n, size), size, generator=make(0)) * 255).round()
    middle = size // 2
    rows, columns = views[:, 0, middle, middle], views[:, 1, middle, middle]
    flip = views[:, 1, middle, middle] > views[:, 1, middle, middle + 1]
    top = rows - 1 - middle
    left = torch.where(flip, columns - 1 - (size - 1 - middle), columns - 1 - middle)
    for offsets in (top, left):
        counts = torch.bincount((offsets + padding).long())
        assert len(counts) == 2 * padding + 1
        assert (counts / n - 1 / len(counts)).abs().max() < 5 * (1 / len(counts) / n) ** 0.5
    assert flip.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.corrcoef(torch.stack([top, left, flip.float()])).fill_diagonal_(0).abs().max() < 0.06
    # Whole images, by the offsets just read off.
    rebuilt = shift_flip(coordinates(n, size), (top + padding).long(), (left + padding).long(), flip, padding)
    assert torch.equal(views, rebuilt.float())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_of_another_size_are_resized_first(interpolation):
    images = make_images(8, 40, 60)
    views = Views(32, interpolation)
    found = views(images, ["padded_crop"], generator=make(3))["padded_crop"]
    resized = (views(images, ["original"])["original"] * 255).round().to(torch.uint8)
    assert torch.equal(found, padded_crop(resized, 32, generator=make(3)))


# ---------------------------------------------------------------------- resized crop
def record_crops(monkeypatch) -> list[tuple[torch.Tensor, ...]]:
    seen: list[tuple[torch.Tensor, ...]] = []
    inner = crops_module.crop_resize

    def spy(images, crops, flip, size, interpolation):
        seen.append((*crops, flip))
        return inner(images, crops, flip, size, interpolation)

    monkeypatch.setattr(crops_module, "crop_resize", spy)
    return seen


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("image_size", [(32, 32), (40, 60)])
def test_resized_crop_equals_torchvision_on_pil(monkeypatch, image_size, interpolation):
    images, seen = make_images(40, *image_size), record_crops(monkeypatch)
    views = resized_crop(images, 28, interpolation=interpolation, generator=make(0)) * 255
    assert torch.allclose(views, views.round(), atol=1e-3)
    ((*boxes, flip),) = seen
    assert 0 < flip.sum() < 40
    mode, equal = InterpolationMode(interpolation), 0.0
    for k, image in enumerate(images):
        box = [int(values[k]) for values in boxes]
        view = F.horizontal_flip(views[k]) if flip[k] else views[k]
        # `resized_crop` in two steps: rows first on every version of Pillow (13 starts some tall crops with columns).
        expected = F.resize(F.resize(F.crop(to_pil(image), *box), [box[2], 28], mode), [28, 28], mode)
        error = (view.round() - from_pil(expected)).abs()
        assert error.max() <= 2
        equal += (error == 0).float().mean().item() / len(images)
    assert equal > (0.98 if interpolation == "bilinear" else 0.999)  # the triangle filter meets exact ties


def test_resized_crops_are_distributed_as_torchvisions(monkeypatch):
    n, seen = 4000, record_crops(monkeypatch)
    resized_crop(torch.zeros(n, 3, 48, 64, dtype=torch.uint8), 2, generator=make(0))
    *boxes, flip = (torch.cat(parts) for parts in zip(*seen, strict=True))
    image = torch.empty(3, 48, 64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    theirs, ours = torch.tensor(drawn).T.double(), torch.stack(boxes).double()
    for name, a, b in (
        *zip(("top", "left", "height", "width"), ours, theirs, strict=True),
        ("area", ours[2] * ours[3], theirs[2] * theirs[3]),
    ):
        levels = torch.cat([a, b]).unique()
        parts = [torch.searchsorted(x.sort().values, levels, right=True) / n for x in (a, b)]
        assert (parts[0] - parts[1]).abs().max() < 1.95 * (2 / n) ** 0.5, name  # Kolmogorov-Smirnov, 0.1 %
    assert 0.075 < (ours[2] * ours[3]).min() / (48 * 64) < 0.09
    assert flip.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_large_batches_are_made_in_parts(monkeypatch):
    images = make_images(10, 20, 24)
    whole = resized_crop(images, 16, generator=make(0))
    seen = record_crops(monkeypatch)
    monkeypatch.setattr(crops_module, "_CHUNK_VALUES", 3 * 3 * 20 * 24)
    assert torch.equal(resized_crop(images, 16, generator=make(0)), whole)
    assert [len(flip) for *_, flip in seen] == [3, 3, 3, 1]


# ---------------------------------------------------------------------- both
def test_named_views_are_crops_of_their_own():
    images = make_images(6, 32, 32)
    views = Views(24)(images, NAMES, generator=make(0))
    assert list(views) == list(NAMES)
    for view in views.values():
        assert view.shape == (6, 3, 24, 24) and view.dtype == torch.float32 and view.is_contiguous()
        assert view.min() >= 0 and view.max() <= 1
    assert not torch.equal(*views.values())
    weak = Views(24)(images, NAMES, strength=0.0, generator=make(0))
    assert all(torch.equal(weak[name], views[name]) for name in NAMES)  # strength is of the random views


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_come_from_the_generator(name):
    images = make_images(2, 32, 32).repeat(4, 1, 1, 1)
    views = Views(32)
    before = torch.random.get_rng_state()
    one, again, other = (views(images, [name], generator=make(seed))[name] for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert len(one.flatten(1).unique(dim=0)) > 4  # two images, but every copy draws its own crop
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(views(images, [name])[name], one)


@pytest.mark.parametrize("name", NAMES)
def test_no_shape_depends_on_the_data(name):
    """On an accelerator the host never waits; on the meta device it could not."""
    view = Views(32)(torch.empty(5, 3, 40, 48, dtype=torch.uint8, device="meta"), [name], generator=make(0))[name]
    assert view.shape == (5, 3, 32, 32) and view.device.type == "meta"


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_gives_an_empty_view(name):
    assert Views(8)(torch.empty(0, 3, 9, 9, dtype=torch.uint8), [name])[name].shape == (0, 3, 8, 8)
