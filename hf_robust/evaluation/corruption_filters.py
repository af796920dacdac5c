"""Image filters that the common corruptions are made of, in numpy and scipy, rounding as the original tools round.

The published corruptions were made with scikit-image, OpenCV and ImageMagick. None of them is needed here: what they
compute is written down again from their documentation and formulas, borders and rounding included, because an image
is cut to whole grey levels at the end and a last bit decides a level. Arrays are `(H, W)` or `(H, W, channels)`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy import ndimage

__all__ = [
    "affine_warp",
    "chamfer_distance",
    "correlate",
    "defocus_kernel",
    "edges",
    "equalized",
    "gaussian",
    "hsv_to_rgb",
    "motion_blur",
    "plasma",
    "rgb_to_hsv",
    "zoom_in",
]

Array = NDArray[Any]

MOTION_LEVELS = 257  # ImageMagick computes in 16 bits: 255 * 257 = 65535
FAR = 1e6  # pixels: no edge anywhere


def gaussian(image: Array, sigma: float, *, mode: str = "nearest", truncate: float = 4.0) -> Array:
    """Blur every channel by a Gaussian.

    Args:
        image (`ndarray`): `(H, W)` or `(H, W, channels)`, floats; the result has their type.
        sigma (`float`): standard deviation in pixels; 0 changes nothing.
        mode (`str`, defaults to `"nearest"`): what lies beyond the border, in scipy's words.
        truncate (`float`, defaults to 4): where the kernel ends, in standard deviations.

    Source: `skimage.filters.gaussian` and its defaults.
    """
    per_axis = (sigma, sigma, 0)[: image.ndim]
    return ndimage.gaussian_filter(image, per_axis, mode=mode, truncate=truncate)


def correlate(image: Array, kernel: Array) -> Array:
    """Slide a kernel over every channel; the border is a mirror whose edge pixel is not repeated.

    Source: OpenCV's `filter2D` and `blur` (a kernel of ones), `BORDER_REFLECT_101`.
    """
    weights = kernel.reshape(kernel.shape + (1,) * (image.ndim - 2))
    return ndimage.correlate(image, weights, mode="mirror")


def defocus_kernel(radius: float, softness: float) -> Array:
    """A disk with a soft rim.

    Args:
        radius (`float`): of the disk, in pixels.
        softness (`float`): standard deviation of the blur of its rim, in pixels.

    Returns:
        `ndarray` of shape `(17, 17)`, or `(2 * radius + 1, 2 * radius + 1)` beyond radius 8; float32.

    Source: `disk` in the released generators.
    """
    reach, taps = (8, 1) if radius <= 8 else (math.ceil(radius), 2)
    axis = np.arange(-reach, reach + 1)
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float32)
    disk /= disk.sum()
    rim = np.exp(-0.5 * (np.arange(-taps, taps + 1) / softness) ** 2)
    rim = (rim / rim.sum()).astype(np.float32)
    return correlate(correlate(disk, rim[None]), rim[:, None])


def zoom_in(image: Array, factor: float) -> Array:
    """Enlarge the centre of an image (bilinear) and cut it to the old size.

    Args:
        image (`ndarray` of shape `(H, W, channels)`): floats.
        factor (`float`): 1 or more.

    Source: `clipped_zoom` in the released generators, which crops by the height only (their images are square).
    """
    height, width = image.shape[:2]
    crop = [math.ceil(side / factor) for side in (height, width)]
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    zoomed = ndimage.zoom(image[top : top + crop[0], left : left + crop[1]], (factor, factor, 1), order=1)
    top, left = (zoomed.shape[0] - height) // 2, (zoomed.shape[1] - width) // 2
    return zoomed[top : top + height, left : left + width]


def motion_blur(image: NDArray[np.uint8], radius: float, sigma: float, angle: float) -> NDArray[np.uint8]:
    """Smear an image to one side, along a line of whole pixels, with weights of half a Gaussian.

    Args:
        image (`ndarray`): uint8 `(H, W)` or `(H, W, channels)`.
        radius (`float`): the line has `2 * radius + 1` pixels.
        sigma (`float`): standard deviation of the weights, in pixels.
        angle (`float`): direction in degrees, 0 from the right, 90 from below.

    Returns:
        `ndarray`: uint8, same shape.

    Source: ImageMagick 6, `MagickMotionBlurImage` with 16 bits per value and its edge pixels repeated.
    """
    height, width = image.shape[:2]
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2.0 * sigma * sigma))
    weights /= weights.sum()
    along, down = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    rows, columns = np.arange(height)[:, None], np.arange(width)
    total = np.zeros(image.shape)
    for step, weight in zip(steps, weights, strict=True):
        y = np.clip(rows + math.ceil(step * down - 0.5), 0, height - 1)
        x = np.clip(columns + math.ceil(step * along - 0.5), 0, width - 1)
        total += weight * (image[y, x] * float(MOTION_LEVELS))
    # Rounded to 16 bits; what 8 bits cannot hold is cut off.
    return np.floor(np.floor(total + 0.5) / MOTION_LEVELS).astype(np.uint8)


def plasma(side: int, decay: float, rng: RandomState) -> Array:
    """A cloudy height map that repeats itself beyond its borders (diamond-square).

    Args:
        side (`int`): a power of two.
        decay (`float`): how much smoother each finer scale is; 1 is rough, 3 is smooth.
        rng (`RandomState`): three uniform draws per scale.

    Returns:
        `ndarray` of shape `(side, side)`: its smallest value is 0, its largest 1.

    Source: `plasma_fractal` in the released generators; the roughness of a scale is the square of its amplitude.
    """
    heights, step, amplitude = np.zeros((side, side)), side, 100.0

    def rough(total: Array) -> Array:
        return total / 4 + amplitude * rng.uniform(-amplitude, amplitude, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = centres = rough(pairs + np.roll(pairs, -1, 1))
        heights[::step, half::step] = rough(centres + np.roll(centres, 1, 0) + (corners + np.roll(corners, -1, 1)))
        heights[half::step, ::step] = rough(centres + np.roll(centres, 1, 1) + (corners + np.roll(corners, -1, 0)))
        step, amplitude = half, amplitude / decay
    heights -= heights.min()
    return heights / heights.max()


def rgb_to_hsv(image: Array) -> Array:
    """Hue, saturation and value, each in [0, 1].

    Args:
        image (`ndarray` of shape `(H, W, 3)`): RGB in [0, 1].

    Source: A. R. Smith, "Color gamut transform pairs", SIGGRAPH 1978.
    """
    value, spread = image.max(-1), np.ptp(image, axis=-1)
    red, green, blue = np.moveaxis(image, -1, 0)
    grey = spread == 0
    divisor = np.where(grey, 1.0, spread)
    hue = np.select(
        [grey, blue == value, green == value],
        [np.zeros_like(value), 4 + (red - green) / divisor, 2 + (blue - red) / divisor],
        (green - blue) / divisor,
    )
    saturation = np.where(grey, 0.0, spread / np.where(value == 0, 1.0, value))
    return np.stack([(hue / 6) % 1, saturation, value], -1)


def hsv_to_rgb(image: Array) -> Array:
    """The way back from [`rgb_to_hsv`]: RGB in [0, 1], `(H, W, 3)`."""
    hue, saturation, value = np.moveaxis(image, -1, 0)
    sector = np.floor(hue * 6)
    rest = hue * 6 - sector
    low = value * (1 - saturation)
    falling, rising = value * (1 - rest * saturation), value * (1 - (1 - rest) * saturation)
    mixes = [
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    ]
    chosen = (sector.astype(np.int64) % 6)[None, ..., None]
    return np.take_along_axis(np.stack([np.stack(mix, -1) for mix in mixes]), chosen, 0)[0]


def affine_warp(image: Array, source: Array, target: Array) -> Array:
    """Move three points of an image to three others and everything else along; bilinear, mirrored borders.

    Args:
        image (`ndarray` of shape `(H, W, channels)`): floats; the result has their type.
        source (`ndarray` of shape `(3, 2)`): points (x, y), not on one line.
        target (`ndarray` of shape `(3, 2)`): where they go.
    """
    # Where each pixel of the result comes from: the map of the targets to the sources.
    matrix = np.linalg.solve(np.column_stack([target, np.ones(3)]).astype(float), source.astype(float))
    rows, columns = np.indices(image.shape[:2])
    x, y = np.moveaxis(np.stack([columns, rows, np.ones(rows.shape)], -1) @ matrix, -1, 0)
    channels = [
        ndimage.map_coordinates(image[..., channel], [y, x], order=1, mode="mirror")
        for channel in range(image.shape[-1])
    ]
    return np.stack(channels, -1)


def edges(image: NDArray[np.uint8], low: float, high: float) -> NDArray[np.bool_]:
    """Edges of a grey image: ridges of the gradient above `low` that hang together with one above `high`.

    Args:
        image (`ndarray` of shape `(H, W)`): uint8.
        low (`float`): of |dx| + |dy| by Sobel.
        high (`float`): likewise.

    Source: J. Canny, "A Computational Approach to Edge Detection", PAMI 1986; OpenCV's choice among equal neighbours.
    """
    levels = image.astype(np.int64)
    smooth, slope = np.array([1, 2, 1]), np.array([-1, 0, 1])
    dx = ndimage.correlate1d(ndimage.correlate1d(levels, smooth, 0, mode="nearest"), slope, 1, mode="nearest")
    dy = ndimage.correlate1d(ndimage.correlate1d(levels, smooth, 1, mode="nearest"), slope, 0, mode="nearest")
    size = abs(dx) + abs(dy)
    around = np.pad(size, 1)

    def beside(down: int, right: int) -> Array:
        return around[1 + down : 1 + down + size.shape[0], 1 + right : 1 + right + size.shape[1]]

    flat, steep = math.tan(math.pi / 8), math.tan(3 * math.pi / 8)
    rising = (dx < 0) == (dy < 0)
    ridge = np.select(
        [abs(dy) < flat * abs(dx), abs(dy) > steep * abs(dx), rising],
        [
            (size > beside(0, -1)) & (size >= beside(0, 1)),
            (size > beside(-1, 0)) & (size >= beside(1, 0)),
            (size > beside(-1, -1)) & (size > beside(1, 1)),
        ],
        (size > beside(-1, 1)) & (size > beside(1, -1)),
    )
    pieces, _ = ndimage.label(ridge & (size > low), np.ones((3, 3)))
    strong = np.unique(pieces[ridge & (size > high)])
    return np.isin(pieces, strong[strong > 0])


def chamfer_distance(marked: NDArray[np.bool_], limit: float) -> Array:
    """Distance of every pixel to the nearest marked one, along steps to neighbours and of a knight.

    Args:
        marked (`ndarray` of shape `(H, W)`): booleans.
        limit (`float`): where counting ends; nothing is farther.

    Returns:
        `ndarray` of shape `(H, W)`: pixels.

    Source: G. Borgefors, "Distance transformations in digital images", 1986, with the 5 x 5 weights of OpenCV.
    """
    lengths = {(0, 1): 1.0, (1, 1): 1.4, (1, 2): 2.1969}
    distance = np.where(marked, 0.0, FAR)
    height, width = marked.shape
    while True:
        around, nearer = np.pad(distance, 2, constant_values=FAR), distance
        for down in range(-2, 3):
            for right in range(-2, 3):
                length = lengths.get((min(abs(down), abs(right)), max(abs(down), abs(right))))
                if length is not None:
                    beside = around[2 + down : 2 + down + height, 2 + right : 2 + right + width]
                    nearer = np.minimum(nearer, beside + length)
        if np.array_equal(np.minimum(nearer, limit), np.minimum(distance, limit)):
            return np.minimum(distance, limit)
        distance = nearer


def equalized(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Spread the grey levels of an image so that each is about equally frequent.

    Args:
        image (`ndarray` of shape `(H, W)`): uint8; one of a single level is returned as it is.
    """
    counts = np.bincount(image.ravel(), minlength=256)
    first = int(np.flatnonzero(counts)[0])
    left = image.size - counts[first]
    if left == 0:
        return image.copy()
    table = np.zeros(256)
    table[first + 1 :] = np.cumsum(counts[first + 1 :]) * np.float32(255.0 / left)
    return np.rint(table).astype(np.uint8)[image]
