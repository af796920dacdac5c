from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from hf_robust import crops as crops_module
from hf_robust import views as views_module
from hf_robust.frequencies import high_pass
from hf_robust.views import ViewParameters, Views, apply_parameters, sample_parameters

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def make_images(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth coloured patterns with noise, saturated in places: closer to photographs than uniform noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, height // 4 + 2, width // 4 + 2, generator=generator) * 1.2 - 0.1
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round().to(torch.uint8)


def draw(n: int, image_size: tuple[int, int] = (32, 32), seed: int = 0, **kwargs) -> ViewParameters:
    return sample_parameters(n, image_size=image_size, generator=torch.Generator().manual_seed(seed), **kwargs)


def without_colour(parameters: ViewParameters) -> ViewParameters:
    never = torch.zeros(len(parameters), dtype=torch.bool)
    return dataclasses.replace(parameters, jitter=never, gray=never)


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pil_resize(image: Image.Image, height: int, width: int, interpolation: str) -> Image.Image:
    # Rows first on every version of Pillow (13 starts with the columns for some tall images).
    rows_done = image.resize((width, image.height), FILTERS[interpolation])
    return rows_done.resize((width, height), FILTERS[interpolation])


def pil_crop(image: Image.Image, parameters: ViewParameters, row: int, size: int, interpolation: str) -> Image.Image:
    top, left, height, width = (
        int(field[row]) for field in (parameters.top, parameters.left, parameters.height, parameters.width)
    )
    view = pil_resize(F.crop(image, top, left, height, width), size, size, interpolation)
    return F.horizontal_flip(view) if parameters.flip[row] else view


def pil_colours(view: Image.Image, parameters: ViewParameters, row: int) -> Image.Image:
    amounts = (parameters.brightness, parameters.contrast, parameters.saturation, parameters.hue)
    if parameters.jitter[row]:
        for operation in parameters.order[row].tolist():
            view = ADJUST[operation](view, float(amounts[operation][row]))
    return F.rgb_to_grayscale(view, num_output_channels=3) if parameters.gray[row] else view


def pil_view(image: torch.Tensor, parameters: ViewParameters, row: int, size: int, interpolation: str) -> torch.Tensor:
    return from_pil(pil_colours(pil_crop(to_pil(image), parameters, row, size, interpolation), parameters, row))


def to_levels(views: torch.Tensor) -> torch.Tensor:
    levels = views * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    return levels.round()


def difference(views: torch.Tensor, images: torch.Tensor, parameters: ViewParameters, interpolation: str):
    size = views.shape[-1]
    expected = torch.stack([pil_view(image, parameters, k, size, interpolation) for k, image in enumerate(images)])
    return (to_levels(views) - expected).abs()


def share(condition: torch.Tensor) -> float:
    return condition.float().mean().item()


SHAPES = [((32, 32), 32), ((96, 96), 32), ((40, 60), 32), ((60, 40), 32), ((24, 20), 32), ((72, 90), 56)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("image_size", "size"), SHAPES)
def test_crop_and_flip_equal_pillow(image_size, size, interpolation):
    images = make_images(48, *image_size)
    parameters = without_colour(draw(48, image_size))
    error = difference(
        apply_parameters(images, parameters, size=size, interpolation=interpolation), images, parameters, interpolation
    )
    # Shrinking with the triangle filter meets exact ties between levels all the time.
    shrinks = min(image_size) > size
    assert share(error == 0) > (0.985 if interpolation == "bilinear" and shrinks else 0.9995)
    assert error.max() <= 2
    assert share(error <= 1) > 0.99999


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_equals_torchvisions_resized_crop(interpolation):
    images = make_images(64, 32, 32)
    parameters = without_colour(draw(64))
    views = to_levels(apply_parameters(images, parameters, size=32, interpolation=interpolation))
    mode = InterpolationMode(interpolation)
    for k, image in enumerate(images):
        box = [int(field[k]) for field in (parameters.top, parameters.left, parameters.height, parameters.width)]
        expected = F.resized_crop(to_pil(image), *box, [32, 32], interpolation=mode)
        if parameters.flip[k]:
            expected = F.horizontal_flip(expected)
        assert (views[k] - from_pil(expected)).abs().max() <= 1
        assert share(views[k] == from_pil(expected)) > 0.99


def test_crop_looks_at_nothing_outside_the_crop():
    images = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    images[:, :, 8:20, 4:12] = 7
    parameters = dataclasses.replace(
        without_colour(draw(1)), **{k: torch.tensor([v]) for k, v in dict(top=8, left=4, height=12, width=8).items()}
    )
    for interpolation in FILTERS:
        views = apply_parameters(images, parameters, size=32, interpolation=interpolation)
        assert torch.equal(to_levels(views), torch.full((1, 3, 32, 32), 7.0))


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
def test_each_colour_operation_equals_torchvision_on_pil(operation):
    images = make_images(96, 24, 40)
    extent = 0.1 if operation == HUE else 0.4
    amounts = (torch.rand(96, generator=torch.Generator().manual_seed(1)) * 2 - 1) * extent + (operation != HUE)
    changed = views_module._change_colour(images.float(), operation, amounts[:, None, None, None])
    expected = torch.stack(
        [from_pil(ADJUST[operation](to_pil(image), float(a))) for image, a in zip(images, amounts, strict=True)]
    )
    error = (changed - expected).abs()
    if operation == HUE:
        assert share(error == 0) > 0.998
        assert error.max() <= 6
    else:
        assert share(error == 0) > 0.99999
        assert error.max() <= 1
    assert share(expected == images) < 0.6  # the operation does something


def test_hue_of_every_corner_case_equals_torchvision_on_pil():
    # All triples of a coarse grid: greys, ties between channels, black, white, pure colours.
    grid = torch.tensor(list(itertools.product([0, 1, 85, 127, 128, 254, 255], repeat=3)), dtype=torch.uint8)
    image = grid.T.reshape(1, 3, 7, 49)
    for turns in (-0.1, -0.05, 0.0, 0.03, 0.1):
        changed = views_module._change_colour(image.float(), HUE, torch.tensor([turns]))
        assert torch.equal(changed[0], from_pil(F.adjust_hue(to_pil(image[0]), turns)).float())


def test_grayscale_equals_torchvision_on_pil():
    images = make_images(16, 32, 48)
    gray = views_module._grayscale(images.float()).expand(-1, 3, -1, -1)
    expected = torch.stack([from_pil(F.rgb_to_grayscale(to_pil(image), num_output_channels=3)) for image in images])
    assert torch.equal(gray, expected.float())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("image_size", "size"), [((32, 32), 32), ((40, 60), 32), ((20, 24), 32)])
def test_whole_pipeline_equals_pil(image_size, size, interpolation):
    images = make_images(192, *image_size)
    parameters = draw(192, image_size)
    views = apply_parameters(images, parameters, size=size, interpolation=interpolation)
    assert views.shape == (192, 3, size, size) and views.dtype == torch.float32
    error = difference(views, images, parameters, interpolation)
    assert share(error == 0) > (0.985 if interpolation == "bilinear" and min(image_size) > size else 0.995)
    assert share(error <= 1) > 0.997
    assert error.max() <= 16


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("image_size", [(32, 32), (45, 30), (20, 24)])
def test_both_device_forms_agree(image_size, interpolation):
    images = make_images(150, *image_size)  # more than one chunk
    parameters = draw(150, image_size)
    grouped = views_module._apply_grouped(images, parameters, 32, interpolation, False)
    masked = views_module._apply_masked(images, parameters, 32, interpolation, False)
    assert torch.equal(grouped, masked)
    assert torch.equal(grouped, apply_parameters(images, parameters, size=32, interpolation=interpolation))


@pytest.mark.parametrize(("image_size", "size"), [((32, 32), 32), ((40, 60), 32)])
def test_colours_before_the_crop_equal_pil(image_size, size):
    images = make_images(150, *image_size)  # more than one chunk
    parameters = draw(150, image_size)
    views = apply_parameters(images, parameters, size=size, colors_first=True)
    slow = [
        from_pil(pil_crop(pil_colours(to_pil(image), parameters, row), parameters, row, size, "bicubic"))
        for row, image in enumerate(images)
    ]
    error = (to_levels(views) - torch.stack(slow)).abs()
    assert share(error <= 1) > 0.997 and share(error == 0) > 0.99
    usual = apply_parameters(images, parameters, size=size)
    assert share((views - usual).abs() > 1.5 / 255) > 0.1  # the order of the two matters
    assert torch.equal(views, views_module._apply_masked(images, parameters, size, "bicubic", True))


def test_colours_first_is_an_option_of_views():
    images = make_images(20, 40, 40)
    made = Views(32, colors_first=True)(images, ["view_1"], generator=torch.Generator().manual_seed(3))["view_1"]
    assert torch.equal(made, apply_parameters(images, draw(20, (40, 40), seed=3), size=32, colors_first=True))
    assert repr(Views(32, colors_first=True)) == "Views(size=32, interpolation='bicubic', colors_first=True)"
    assert repr(Views(32)) == "Views(size=32, interpolation='bicubic')"  # checkpoints hold this text


def test_accelerator_form_depends_on_no_data():
    # The meta device knows shapes only: .item(), nonzero() and boolean indexing fail on it.
    images = torch.empty(6, 3, 40, 30, dtype=torch.uint8, device="meta")
    made = Views(32)(images, ["view_1", "original"])
    assert all(view.shape == (6, 3, 32, 32) and view.device.type == "meta" for view in made.values())
    drawn = sample_parameters(6, image_size=(40, 30), device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        views_module._apply_grouped(images, drawn, 32, "bicubic", False)


def test_weights_of_accelerators_survive_tf32():
    parameters = draw(32, (50, 70))
    weights = crops_module._resampling_weights(parameters.left, parameters.width, 70, 32, "bicubic", parameters.flip)
    parts = crops_module._tf32_parts(weights)
    assert torch.equal(sum(parts), weights)
    for part in parts:
        assert (part.contiguous().view(torch.int32) & 0x1FFF == 0).float().mean() > 0.999  # 10 bits of mantissa
    assert (weights.view(torch.int32) & 0x1FFF == 0).float().mean() < 0.95


def test_autocast_changes_nothing():
    images = make_images(8, 40, 40)
    parameters = draw(8, (40, 40))
    expected = apply_parameters(images, parameters, size=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply_parameters(images, parameters, size=32), expected)
        assert torch.equal(views_module._apply_masked(images, parameters, 32, "bicubic", False), expected)


def test_every_image_draws_its_own_parameters():
    copies = make_images(1, 32, 32).expand(64, -1, -1, -1)
    made = Views(32)(copies, ["view_1"], generator=torch.Generator().manual_seed(0))["view_1"]
    assert len(torch.unique(made.flatten(1), dim=0)) == 64


def test_an_image_gets_the_same_view_in_any_batch():
    images = make_images(200, 32, 32)
    parameters = draw(200)
    together = apply_parameters(images, parameters, size=32)
    for row in (0, 127, 128, 199):
        alone = apply_parameters(images[row : row + 1], parameters[row : row + 1], size=32)
        assert torch.equal(alone[0], together[row])
    rows = torch.tensor([5, 3, 3])
    assert torch.equal(apply_parameters(images[rows], parameters[rows], size=32), together[rows])


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    grid = np.concatenate([a, b])
    a, b = np.sort(a), np.sort(b)
    gap = np.searchsorted(a, grid, side="right") / len(a) - np.searchsorted(b, grid, side="right") / len(b)
    return float(np.abs(gap).max())


def ks_limit(n: int, m: int) -> float:
    return 1.95 * math.sqrt((n + m) / (n * m))  # level 0.001, and the seeds are fixed


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("image_size", [(32, 32), (40, 60), (60, 40), (24, 64)])
def test_crops_are_distributed_as_torchvisions(image_size, strength):
    torch.manual_seed(0)
    n, m = 6000, 3000
    ours = draw(n, image_size, seed=3, strength=strength)
    image = Image.new("RGB", image_size[::-1])
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [1 - 0.9 * strength, 1.0], [3 / 4, 4 / 3]) for _ in range(m)]
    )
    mine = torch.stack([ours.top, ours.left, ours.height, ours.width], dim=1).numpy()
    assert mine.dtype == np.int64
    assert (mine[:, :2] >= 0).all() and (mine[:, 2:] >= 1).all() and (mine[:, :2] + mine[:, 2:] <= image_size).all()

    def statistics(box: np.ndarray) -> dict[str, np.ndarray]:
        top, left, height, width = box.T
        return {"top": top, "left": left, "height": height, "width": width, "area": height * width} | {
            "ratio": width / height,
            "right": image_size[1] - left - width,
        }

    for name, values in statistics(mine).items():
        assert ks_distance(values, statistics(theirs)[name]) < ks_limit(n, m), name


def test_first_fitting_try_is_taken_and_the_fallback_is_central():
    wide = draw(4000, (16, 64), strength=0.0)  # a crop of the full area and an allowed ratio never fits
    for field, value in {"top": 0, "left": 21, "height": 16, "width": 21}.items():
        assert (getattr(wide, field) == value).all()
    image = Image.new("RGB", (64, 16))
    assert RandomResizedCrop.get_params(image, [1.0, 1.0], [3 / 4, 4 / 3]) == (0, 21, 16, 21)
    tall = draw(10, (64, 16), strength=0.0)
    assert (tall.top == 21).all() and (tall.height == 21).all() and (tall.width == 16).all()


def test_crop_of_given_numbers():
    # Two tries that fail (full area at ratios 4/3 and 3/4) before the third, of area 0.25 and ratio 1.
    draws = torch.full((1, 22), 1.0)
    draws[0, 2:10] = 0.15 / 0.9
    draws[0, 10:20] = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    draws[0, 20:] = torch.tensor([0.999, 0.5])
    assert [int(v) for v in crops_module.sample_crops(draws, (32, 32), 0.1)] == [16, 8, 16, 16]


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_strength_scales_every_knob_but_the_flip(strength):
    n = 20000
    drawn = draw(n, strength=strength)

    def is_share(values: torch.Tensor, probability: float) -> bool:
        return abs(share(values) - probability) < 4.5 * math.sqrt(0.25 / n) * (probability > 0) + 1e-9

    assert is_share(drawn.flip, 0.5)
    assert is_share(drawn.jitter, 0.8 * strength)
    assert is_share(drawn.gray, 0.2 * strength)
    for name, extent, centre in [
        ("brightness", 0.4, 1),
        ("contrast", 0.4, 1),
        ("saturation", 0.4, 1),
        ("hue", 0.1, 0),
    ]:
        values = getattr(drawn, name).double().numpy() - centre
        assert np.abs(values).max() <= extent * strength + 1e-6, name
        if strength > 0:
            uniform = (np.arange(n) + 0.5) / n * 2 - 1
            assert ks_distance(values / (extent * strength), uniform) < 1.95 / math.sqrt(n), name
            assert abs(values.std() / (extent * strength / math.sqrt(3)) - 1) < 0.015, name
    area = (drawn.height * drawn.width).double() / 1024
    assert area.min() >= (1 - 0.9 * strength) * 0.9
    assert area.min() <= (1 - 0.9 * strength) * 1.1 + 1e-9


def test_factors_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = [
        ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(3000)
    ]
    ours = draw(6000)
    for position, name in enumerate(["brightness", "contrast", "saturation", "hue"]):
        values = np.array([one[position + 1] for one in theirs])
        assert ks_distance(getattr(ours, name).numpy(), values) < ks_limit(6000, 3000), name


def test_all_orders_are_equally_likely_and_draws_are_independent():
    n = 24000
    drawn = draw(n)
    counts = torch.unique(drawn.order, dim=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 1000).double() ** 2 / 1000).sum() < 49.7  # chi-square, 23 degrees of freedom, level 0.001
    columns = [drawn.top, drawn.left, drawn.height * drawn.width, drawn.flip, drawn.jitter, drawn.brightness]
    columns += [drawn.contrast, drawn.saturation, drawn.hue, drawn.order[:, 0], drawn.gray]
    correlation = torch.corrcoef(torch.stack([column.double() for column in columns]))
    correlation[:3, :3] = 0  # position and size of a crop do depend on each other
    assert (correlation - torch.diag(correlation.diag())).abs().max() < 4.5 / math.sqrt(n)


def test_strength_zero_leaves_the_image_and_the_flip():
    images = make_images(40, 32, 32)
    for image_size in [(32, 32), (33, 33), (96, 96)]:
        drawn = draw(2000, image_size, strength=0.0)
        assert (drawn.height == image_size[0]).all() and (drawn.width == image_size[1]).all()
    made = Views(32)(images, ["view_1"], strength=0.0, generator=torch.Generator().manual_seed(0))["view_1"]
    flipped = (made == images.flip(3) / 255).flatten(1).all(dim=1)
    assert ((made == images / 255).flatten(1).all(dim=1) ^ flipped).all()
    assert 8 < flipped.sum() < 32


def test_same_seed_same_views_and_strengths_share_their_numbers():
    images = make_images(16, 32, 32)
    views = Views(32)

    def make(seed: int, **kwargs) -> torch.Tensor:
        return views(images, ["view_1"], generator=torch.Generator().manual_seed(seed), **kwargs)["view_1"]

    assert torch.equal(make(1), make(1))
    assert not torch.equal(make(1), make(2))
    strong, weak = draw(500, strength=1.0), draw(500, strength=0.25)
    assert torch.equal(strong.flip, weak.flip) and torch.equal(strong.order, weak.order)
    assert torch.allclose((strong.hue - weak.hue * 4).abs(), torch.zeros(500), atol=1e-6)
    assert (strong.jitter | ~weak.jitter).all()


def test_random_numbers_come_from_the_global_generator_unless_one_is_given():
    images = make_images(4, 32, 32)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = Views(32)(images, ["view_1"])["view_1"]
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(Views(32)(images, ["view_1"])["view_1"], first)
    state = torch.get_rng_state()
    Views(32)(images, ["view_1", "original"], generator=torch.Generator())
    Views(32)(images, ["original"])
    assert torch.equal(torch.get_rng_state(), state)


def test_named_views_differ_and_original_takes_no_random_number():
    images = make_images(12, 32, 32)
    made = Views(32)(images, ["view_1", "original", "view_2"], generator=torch.Generator().manual_seed(0))
    assert list(made) == ["view_1", "original", "view_2"]
    assert all((made["view_1"][k] != made["view_2"][k]).any() for k in range(12))
    assert torch.equal(made["original"], images.float() / 255)
    two = Views(32)(images, ("view_1", "view_2"), generator=torch.Generator().manual_seed(0))
    assert torch.equal(two["view_2"], made["view_2"])
    for view in made.values():
        assert view.dtype == torch.float32 and view.min() >= 0 and view.max() <= 1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("image_size", "size"), [((96, 96), 32), ((40, 61), 32), ((61, 40), 32), ((20, 25), 32), ((32, 45), 32)]
)
def test_original_is_resized_as_pil_does(image_size, size, interpolation):
    images = make_images(6, *image_size)
    original = Views(size, interpolation)(images, ["original"])["original"]
    assert original.shape == (6, 3, size, size)
    mode = InterpolationMode(interpolation)
    for image, made in zip(images, to_levels(original), strict=True):
        height, width = F.get_size(F.resize(to_pil(image), [size], interpolation=mode))
        expected = F.center_crop(pil_resize(to_pil(image), height, width, interpolation), [size, size])
        error = (made - from_pil(expected)).abs()
        assert error.max() <= 1
        assert share(error == 0) > (0.995 if interpolation == "bicubic" else 0.96)  # ties of the triangle filter


@pytest.mark.parametrize("size", [32, 16])
def test_high_frequencies_are_those_of_the_same_crop(size):
    images = make_images(4, 40, 40)
    made = Views(size)(images, ["padded_crop", "view_1", "high_frequency"], generator=torch.Generator().manual_seed(3))
    assert torch.equal(made["high_frequency"], high_pass(made["padded_crop"], size / 4))  # 8 at 32 pixels, published
    with_others = Views(size)(images, ["padded_crop"], generator=torch.Generator().manual_seed(3))
    assert torch.equal(with_others["padded_crop"], made["padded_crop"])
    for names in (["high_frequency"], ["high_frequency", "padded_crop"]):
        with pytest.raises(ValueError, match="'high_frequency' is made of 'padded_crop': name that one before it"):
            Views(size)(images, names)


def test_the_smallest_crop_is_an_option_of_views():
    images = make_images(20, 40, 40)
    made = Views(32, minimal_area=0.2)(images, ["view_1"], generator=torch.Generator().manual_seed(3))["view_1"]
    assert torch.equal(made, apply_parameters(images, draw(20, (40, 40), seed=3, minimal_area=0.2), size=32))
    area = [parameters.height * parameters.width for parameters in (draw(2000), draw(2000, minimal_area=0.5))]
    assert area[0].min() < 0.13 * 32 * 32 and area[1].min() > 0.45 * 32 * 32
    whole = draw(50, minimal_area=0.2, strength=0.0)
    assert torch.equal(whole.height, draw(50, strength=0.0).height)
    assert repr(Views(32, minimal_area=0.2)) == "Views(size=32, interpolation='bicubic', minimal_area=0.2)"
    for area in (0.0, 1.5):
        with pytest.raises(
            ValueError, match=rf"minimal_area must be in \(0, 1\], got {area}: ACL takes 0.1, AdvCL 0.2"
        ):
            Views(32, minimal_area=area)


def test_an_empty_batch_gives_empty_views():
    made = Views(32)(torch.empty(0, 3, 40, 32, dtype=torch.uint8), ["view_1", "original"])
    assert all(view.shape == (0, 3, 32, 32) for view in made.values())


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_strength_outside_the_unit_interval(strength):
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\], got .*: write 1"):
        sample_parameters(2, image_size=(32, 32), strength=strength)
    with pytest.raises(ValueError, match="strength"):
        Views(32)(make_images(2, 32, 32), ["original"], strength=strength)


def test_images_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"uint8.*got torch.float32.*\* 255"):
        Views(32)(torch.rand(2, 3, 32, 32), ["view_1"])
    parameters = draw(2)
    for shape in [(2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3), (2, 3, 0, 32)]:
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\), got \(.*images\[None\]"):
            apply_parameters(torch.zeros(shape, dtype=torch.uint8), parameters, size=32)
    with pytest.raises(ValueError, match="got 2 rows for 3 images: use sample_parameters"):
        apply_parameters(make_images(3, 32, 32), parameters, size=32)


def test_unknown_names():
    images = make_images(2, 32, 32)
    known = "view_1, view_2, original, padded_crop, resized_crop, high_frequency"
    with pytest.raises(ValueError, match=rf"unknown view 'orignal': known are {known}; .*'original'"):
        Views(32)(images, ["view_1", "orignal"])
    with pytest.raises(ValueError, match=r"got the string 'view_1': write \['view_1'\]"):
        Views(32)(images, "view_1")
    with pytest.raises(ValueError, match=r"unknown interpolation 'bicubc': known are bicubic, bilinear; .*'bicubic'"):
        Views(32, "bicubc")
    with pytest.raises(ValueError, match="unknown interpolation 'nearest'"):
        apply_parameters(images, draw(2), size=32, interpolation="nearest")


def test_impossible_sizes():
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        Views(0)
    with pytest.raises(ValueError, match="image_size must be"):
        sample_parameters(1, image_size=(0, 32))
