"""The filters behind the corruptions, against slow transcriptions and what they must leave alone."""

from __future__ import annotations

import colorsys
import heapq
import math

import numpy as np
import pytest
from numpy.random import RandomState

from hf_robust.evaluation.corruption_filters import (
    affine_warp,
    chamfer_distance,
    correlate,
    defocus_kernel,
    edges,
    equalized,
    gaussian,
    hsv_to_rgb,
    motion_blur,
    plasma,
    rgb_to_hsv,
    zoom_in,
)

COLOURS = RandomState(0).randint(0, 256, (12, 9, 3)).astype(np.uint8)


def test_colours_are_those_of_the_standard_library_and_come_back() -> None:
    pixels = np.concatenate([COLOURS.reshape(-1, 3), np.eye(3) * 255, np.full((1, 3), 90), np.zeros((1, 3))])[None]
    hsv = rgb_to_hsv(pixels / 255)
    expected = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels[0] / 255]
    np.testing.assert_allclose(hsv[0], expected, atol=1e-12)
    np.testing.assert_allclose(hsv_to_rgb(hsv), pixels / 255, atol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 90.0, -45.0, 30.0, -135.0, 17.3])
def test_motion_smears_along_a_line_of_whole_pixels_with_half_a_gaussian(angle: float) -> None:
    radius, sigma = 3, 1.5
    weights = [math.exp(-(k * k) / (2 * sigma * sigma)) for k in range(2 * radius + 1)]
    expected = np.zeros(COLOURS.shape)
    height, width = COLOURS.shape[:2]
    for row in range(height):
        for column in range(width):
            for step, weight in enumerate(weights):
                y = row + math.ceil(step * math.sin(math.radians(angle)) - 0.5)
                x = column + math.ceil(step * math.cos(math.radians(angle)) - 0.5)
                seen = COLOURS[min(max(y, 0), height - 1), min(max(x, 0), width - 1)]
                expected[row, column] += weight / sum(weights) * seen
    found = motion_blur(COLOURS, radius, sigma, angle)
    assert found.dtype == np.uint8
    assert np.all((found <= expected + 0.01) & (found > expected - 1.01))  # cut off, not rounded
    np.testing.assert_array_equal(motion_blur(COLOURS[..., 0], radius, sigma, angle), found[..., 0])


def test_a_gaussian_blurs_within_a_channel_only_and_sigma_0_changes_nothing() -> None:
    image = np.zeros((15, 15, 3))
    image[7, 7, 1] = 1
    blurred = gaussian(image, 1.0)
    assert blurred[..., 0].max() == blurred[..., 2].max() == 0
    assert blurred[..., 1].sum() == pytest.approx(1) and blurred[7, 8, 1] / blurred[7, 7, 1] == pytest.approx(
        math.exp(-0.5)
    )
    np.testing.assert_array_equal(gaussian(image, 0), image)


def test_correlation_mirrors_at_the_border_without_repeating_it() -> None:
    kernel = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    image = RandomState(1).rand(4, 5, 2)
    around = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    expected = sum(kernel[i, j] * around[i : i + 4, j : j + 5] for i in range(3) for j in range(3))
    np.testing.assert_allclose(correlate(image, kernel), expected)


@pytest.mark.parametrize(
    ("radius", "softness", "side", "pixels"),
    [(0.3, 0.4, 17, 1), (1, 0.2, 17, 5), (8, 0.5, 17, 197), (10, 0.5, 21, 317)],
)
def test_a_defocused_point_is_a_disk_with_a_soft_rim(radius: float, softness: float, side: int, pixels: int) -> None:
    kernel = defocus_kernel(radius, softness)
    assert kernel.shape == (side, side) and kernel.dtype == np.float32
    np.testing.assert_allclose(kernel, kernel.T, atol=1e-7)
    np.testing.assert_allclose(kernel, kernel[::-1], atol=1e-7)
    if radius >= 8:
        assert kernel[side // 2, side // 2] == pytest.approx(1 / pixels, rel=1e-5)
    else:
        rim = np.exp(-0.5 * (np.arange(-1, 2) / softness) ** 2)
        centre = (rim / rim.sum())[1]
        neighbours = (rim / rim.sum())[0]
        expected = centre**2 if pixels == 1 else (centre**2 + 4 * centre * neighbours) / 5
        assert kernel[8, 8] == pytest.approx(expected, rel=1e-5) and kernel.sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("factor", [1, 1.05, 1.26, 2.25, 4.5])
def test_zoom_keeps_the_size_the_centre_and_a_flat_image(factor: float) -> None:
    image = np.zeros((21, 33, 1))
    image[9:12, 15:18] = 1
    zoomed = zoom_in(image, factor)
    assert zoomed.shape == image.shape
    rows, columns = np.nonzero(zoomed[..., 0] > 0.5)
    assert abs(rows.mean() - 10) <= factor and abs(columns.mean() - 16) <= factor
    assert zoomed.sum() == pytest.approx(9 * factor**2, rel=0.3)
    np.testing.assert_allclose(zoom_in(np.full((10, 14, 3), 0.4), factor), 0.4)


def slow_plasma(side: int, decay: float, rng: RandomState) -> np.ndarray:
    """Diamond-square point by point, on a map that repeats itself."""
    heights, step, amplitude = np.zeros((side, side)), side, 100.0
    while step > 1:
        half, n = step // 2, side // step
        for down, right in ((half, half), (0, half), (half, 0)):
            noise = rng.uniform(-amplitude, amplitude, (n, n))
            near = [(half, half), (half, -half), (-half, half), (-half, -half)]
            if (down, right) != (half, half):
                near = [(half, 0), (-half, 0), (0, half), (0, -half)]
            for i in range(n):
                for j in range(n):
                    y, x = i * step + down, j * step + right
                    total = sum(heights[(y + dy) % side, (x + dx) % side] for dy, dx in near)
                    heights[y, x] = total / 4 + amplitude * noise[i, j]
        step, amplitude = half, amplitude / decay
    return (heights - heights.min()) / (heights.max() - heights.min())


@pytest.mark.parametrize(("side", "decay"), [(2, 2.0), (16, 1.75), (32, 3.0)])
def test_plasma_is_diamond_square(side: int, decay: float) -> None:
    found = plasma(side, decay, RandomState(4))
    np.testing.assert_allclose(found, slow_plasma(side, decay, RandomState(4)), atol=1e-12)
    assert found.min() == 0 and found.max() == 1


def test_three_points_move_where_they_are_sent() -> None:
    rows, columns = np.indices((20, 30)).astype(float)
    image = np.stack([columns, rows], -1)
    source = np.array([[15.0, 12], [20, 6], [8, 5]])
    target = source + [[2, 1], [-1, 2], [0, -1]]
    warped = affine_warp(image, source, target)
    for (x, y), origin in zip(target.astype(int), source, strict=True):
        np.testing.assert_allclose(warped[y, x], origin, atol=1e-9)
    np.testing.assert_allclose(affine_warp(image, source, source), image, atol=1e-9)


def test_an_edge_is_one_pixel_wide_and_weak_ones_count_beside_strong_ones_only() -> None:
    image = np.zeros((20, 20), np.uint8)
    image[:, 10:] = 255
    found = edges(image, 50, 150)
    assert found.sum(1).tolist() == [1] * 20 and found[:, 9].all()
    np.testing.assert_array_equal(edges(image.T.copy(), 50, 150), found.T)
    weak = np.zeros((20, 20), np.uint8)
    weak[:, 10:] = 25  # slope 100: above the lower bound only
    assert not edges(weak, 50, 150).any()
    weak[:5, 10:] = 200
    assert edges(weak, 50, 150)[12:, 9].all()
    assert not edges(np.full((8, 8), 9, np.uint8), 50, 150).any()


def test_the_distance_is_the_shortest_way_of_neighbour_and_knight_steps() -> None:
    marked = RandomState(0).rand(14, 17) < 0.02
    assert marked.any()
    expected = np.full(marked.shape, np.inf)
    queue = [(0.0, int(y), int(x)) for y, x in np.argwhere(marked)]
    while queue:
        length, y, x = heapq.heappop(queue)
        if expected[y, x] <= length:
            continue
        expected[y, x] = length
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                cost = {1: 1.0, 2: 1.4, 5: 2.1969}.get(dy * dy + dx * dx)
                if cost and 0 <= y + dy < 14 and 0 <= x + dx < 17:
                    heapq.heappush(queue, (length + cost, y + dy, x + dx))
    np.testing.assert_allclose(chamfer_distance(marked, 100), expected)
    np.testing.assert_allclose(chamfer_distance(marked, 3), np.minimum(expected, 3))
    assert (chamfer_distance(np.zeros((5, 5), bool), 20) == 20).all()


def test_equalized_levels_spread_from_0_to_255_by_rank() -> None:
    image = np.array([[10, 10, 11], [200, 11, 12]], np.uint8)
    np.testing.assert_array_equal(equalized(image), [[0, 0, 128], [255, 128, 191]])
    np.testing.assert_array_equal(equalized(np.full((2, 2), 7, np.uint8)), np.full((2, 2), 7))
