"""The 19 common corruptions of one image: noise, blur, weather and digital artefacts.

Every function takes a uint8 image `(H, W, 3)`, the constant of its severity (`corruption_constants`) and the random
numbers to use, and returns grey levels in [0, 255]: floats, which the caller cuts to whole levels, or uint8. What
looks odd in them (noise that is drawn once for all scales, a swap of pixels that copies) is in the published images.

The random numbers are those of `numpy.random.RandomState`, whose stream numpy has promised never to change, drawn in
the order of the released generators: with their seed comes their image.

Source: Hendrycks and Dietterich, ICLR 2019; `hendrycks/robustness`, `ImageNet-C/create_c/make_cifar_c.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from .corruption_filters import (
    Array,
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

__all__ = ["TRANSFORMS", "Textures", "frost", "frost_texture", "read_frost_textures"]

Pixels = NDArray[np.uint8]
Transform = Callable[[Pixels, Any, RandomState], Array]
Textures = Sequence[Pixels]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
WATER = np.array([175, 238, 238]) / 255  # pale turquoise
MUD = np.array([63, 42, 20]) / 255
FROST_FILES = 5  # the generators name a sixth and never draw it
# Mean colour and standard deviation of those five photographs, in levels; the pattern's decay is ours.
ICE_COLOUR, ICE_SPREAD, ICE_DECAY = np.array([146, 167, 179]), 33, 2.0


def _gaussian_noise(image: Pixels, sigma: float, rng: RandomState) -> Array:
    return _levels(image / 255.0 + rng.normal(size=image.shape, scale=sigma))


def _shot_noise(image: Pixels, photons: float, rng: RandomState) -> Array:
    return _levels(rng.poisson(image / 255.0 * photons) / photons)


def _impulse_noise(image: Pixels, share: float, rng: RandomState) -> Array:
    # scikit-image's salt and pepper: a generator of its own, seeded by one draw, per value and not per pixel.
    own = np.random.default_rng(rng.randint(2**31))
    hit, salt = own.random(image.shape) <= share, own.random(image.shape) <= 0.5
    return np.where(hit, np.where(salt, 255, 0), image).astype(np.uint8)


def _speckle_noise(image: Pixels, sigma: float, rng: RandomState) -> Array:
    pixels = image / 255.0
    return _levels(pixels + pixels * rng.normal(size=image.shape, scale=sigma))


def _gaussian_blur(image: Pixels, sigma: float, rng: RandomState) -> Array:
    return _levels(gaussian(image / 255.0, sigma))


def _glass_blur(image: Pixels, constant: tuple[float, int, int], rng: RandomState) -> Array:
    sigma, reach, sweeps = constant
    height, width = image.shape[:2]
    blurred = (gaussian(image / 255.0, sigma) * 255).astype(np.uint8)
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    place = (rows[:, None] * width + columns).ravel()
    origin = list(range(height * width))
    for _ in range(sweeps):
        moves = rng.randint(-reach, reach, size=(len(place), 2))
        # Meant as a swap; in the released code the first half of it overwrites what the second half reads.
        for here, there in zip(place.tolist(), (place + moves[:, 1] * width + moves[:, 0]).tolist(), strict=True):
            origin[here] = origin[there]
    shuffled = blurred.reshape(-1, 3)[origin].reshape(image.shape)
    return _levels(gaussian(shuffled / 255.0, sigma))


def _defocus_blur(image: Pixels, constant: tuple[float, float], rng: RandomState) -> Array:
    return _levels(correlate(image / 255.0, defocus_kernel(*constant).astype(np.float64)))


def _motion_blur(image: Pixels, constant: tuple[float, float], rng: RandomState) -> Array:
    return motion_blur(image, *constant, angle=rng.uniform(-45, 45))


def _zoom_blur(image: Pixels, constant: tuple[float, float], rng: RandomState) -> Array:
    end, step = constant
    pixels = (image / 255.0).astype(np.float32)
    factors = np.arange(1, end, step)
    total = np.zeros_like(pixels)
    for factor in factors:
        total += zoom_in(pixels, factor)
    return _levels((pixels + total) / (len(factors) + 1))


def _snow(image: Pixels, constant: tuple[float, ...], rng: RandomState) -> Array:
    mean, spread, zoom, threshold, radius, sigma, share = constant
    pixels = image.astype(np.float32) / np.float32(255)
    flakes = zoom_in(rng.normal(size=image.shape[:2], loc=mean, scale=spread)[..., None], zoom)[..., 0]
    flakes[flakes < threshold] = 0
    fallen = motion_blur(_levels(flakes).astype(np.uint8), radius, sigma, angle=rng.uniform(-135, -45))
    layer = (fallen / 255.0)[..., None]
    pale = np.maximum(pixels, (pixels @ LUMA)[..., None] * np.float32(1.5) + np.float32(0.5))
    return _levels(share * pixels + (1 - share) * pale + layer + np.rot90(layer, 2))


def frost(image: Pixels, constant: tuple[float, ...], rng: RandomState, textures: Textures | None = None) -> Array:
    """Lay a texture of ice over an image.

    The published sets use five photographs of ice, which are not part of this package. Without `textures` the ice is
    a random cloud pattern of their mean colour and spread: as strong, but without crystals.

    Args:
        image (`ndarray`): uint8 `(H, W, 3)`.
        constant (`tuple`): factor of the image, factor of the texture, step at which the texture is sampled.
        rng (`RandomState`): draws the texture and the place in it.
        textures (`Sequence[ndarray]`, *optional*): uint8 `(h, w, 3)`, each larger than the image times the step; the
            first five are used, see [`read_frost_textures`].

    Returns:
        `ndarray` of shape `(H, W, 3)`: levels in [0, 255].

    Raises:
        ValueError: for a texture that is too small, or no uint8 RGB image.
    """
    keep, ice, step = constant
    height, width = image.shape[:2]
    if textures is None:
        texture = frost_texture(height, width, rng)
    else:
        chosen = textures[rng.randint(min(FROST_FILES, len(textures)))]
        # A bilinear reduction to a fifth reads exactly the middle of each 5 x 5 block.
        shrunk = chosen[int(step) // 2 :: int(step), int(step) // 2 :: int(step)]
        right_type = chosen.dtype == np.uint8 and chosen.ndim == 3 and chosen.shape[2] == 3
        if not right_type or shrunk.shape[0] <= height or shrunk.shape[1] <= width:
            raise ValueError(
                f"frost textures must be uint8 (h, w, 3) and larger than {step} x the image, got {chosen.dtype} "
                f"{chosen.shape} for an image of {height} x {width}: pass larger ones, or none for generated ice"
            )
        top, left = rng.randint(0, shrunk.shape[0] - height), rng.randint(0, shrunk.shape[1] - width)
        texture = shrunk[top : top + height, left : left + width]
    return np.clip(keep * image.astype(np.float64) + ice * texture, 0, 255)


def frost_texture(height: int, width: int, rng: RandomState) -> Array:
    """A stand-in for a photograph of ice: a bluish cloud pattern, `(height, width, 3)`, levels in [0, 255]."""
    cloud = plasma(_power_of_two(max(height, width)), ICE_DECAY, rng)
    contrast = ICE_SPREAD * (cloud - cloud.mean()) / cloud.std()
    return np.clip(contrast[:height, :width, None] + ICE_COLOUR, 0, 255)


def read_frost_textures(folder: str | os.PathLike[str]) -> list[Pixels]:
    """Read the five photographs of ice of the released generators.

    Args:
        folder (`str` or `PathLike`): holds `frost1.png`, `frost2.png`, `frost3.png`, `frost4.jpg` and `frost5.jpg`.

    Returns:
        `list` of `ndarray`: uint8 `(h, w, 3)`, in the order of their numbers.

    Raises:
        FileNotFoundError: when one is missing.
    """
    textures = []
    for number in range(1, FROST_FILES + 1):
        found = sorted(Path(folder).glob(f"frost{number}.*"))
        if not found:
            raise FileNotFoundError(
                f"no frost{number}.png or .jpg in {str(folder)!r}: all of frost1 to frost{FROST_FILES} are needed "
                "(folder ImageNet-C/create_c of hendrycks/robustness); leave them out for generated ice"
            )
        with Image.open(found[0]) as picture:
            textures.append(np.asarray(picture.convert("RGB")))
    return textures


def _fog(image: Pixels, constant: tuple[float, float], rng: RandomState) -> Array:
    thickness, decay = constant
    height, width = image.shape[:2]
    pixels = image / 255.0
    brightest = pixels.max()
    cloud = plasma(_power_of_two(max(height, width)), decay, rng)[:height, :width, None]
    return _levels((pixels + thickness * cloud) * brightest / (brightest + thickness))


def _brightness(image: Pixels, gain: float, rng: RandomState) -> Array:
    hsv = rgb_to_hsv(image / 255.0)
    hsv[..., 2] = np.clip(hsv[..., 2] + gain, 0, 1)
    return _levels(hsv_to_rgb(hsv))


def _saturate(image: Pixels, constant: tuple[float, float], rng: RandomState) -> Array:
    factor, gain = constant
    hsv = rgb_to_hsv(image / 255.0)
    hsv[..., 1] = np.clip(hsv[..., 1] * factor + gain, 0, 1)
    return _levels(hsv_to_rgb(hsv))


def _contrast(image: Pixels, factor: float, rng: RandomState) -> Array:
    pixels = image / 255.0
    mean = pixels.mean((0, 1), keepdims=True)
    return _levels((pixels - mean) * factor + mean)


def _elastic_transform(image: Pixels, constant: tuple[float, float, float], rng: RandomState) -> Array:
    height, width = image.shape[:2]
    side = min(height, width)
    amplitude, smoothness, shift = (side * value for value in constant)
    pixels = image.astype(np.float32) / np.float32(255)
    middle, reach = np.array([width // 2, height // 2]), side // 3
    corners = np.array([middle + reach, middle + [reach, -reach], middle - reach], np.float32)
    moved = corners + rng.uniform(-shift, shift, size=corners.shape).astype(np.float32)
    pixels = affine_warp(pixels, corners, moved)

    def displacement() -> Array:
        noise = gaussian(rng.uniform(-1, 1, size=(height, width)), smoothness, mode="reflect", truncate=3)
        return (noise * amplitude).astype(np.float32)

    right, down = displacement(), displacement()
    rows, columns = np.indices((height, width))
    places = [rows + down, columns + right]
    channels = [ndimage.map_coordinates(pixels[..., c], places, order=1, mode="reflect") for c in range(3)]
    return _levels(np.stack(channels, -1))


def _pixelate(image: Pixels, factor: float, rng: RandomState) -> Array:
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX))


def _jpeg_compression(image: Pixels, quality: int, rng: RandomState) -> Array:
    stream = BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    with Image.open(stream) as decoded:
        return np.asarray(decoded)


def _spatter(image: Pixels, constant: tuple[float, ...], rng: RandomState) -> Array:
    mean, spread, smoothness, threshold, strength, mud = constant
    pixels = image.astype(np.float32) / np.float32(255)
    liquid = gaussian(rng.normal(size=image.shape[:2], loc=mean, scale=spread), smoothness)
    liquid[liquid < threshold] = 0
    if mud:
        cover = gaussian((liquid > threshold).astype(np.float32), strength)
        cover[cover < 0.8] = 0
        return _levels(pixels * (1 - cover[..., None]) + MUD * cover[..., None])
    drops = _drops((liquid * 255).astype(np.uint8))
    # Without a single drop the released code divides by zero; a dry image is what it means.
    cover = drops / drops.max() * strength if drops.max() > 0 else drops
    return _levels(pixels + cover[..., None] * WATER)


def _drops(liquid: Pixels) -> Array:
    """Water that is brighter on one side of every rim."""
    # Sums of nine divided once: nine ninths of a whole level must not fall below it.
    nine, rim = np.ones((3, 3)), np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float64)
    distance = chamfer_distance(edges(liquid, 50, 150), 20)
    heights = equalized((correlate(distance, nine) / 9).astype(np.uint8))
    lit = np.clip(correlate(heights.astype(np.float64), rim), 0, 255)
    return liquid * np.rint(correlate(lit, nine) / 9)


def _levels(pixels: Array) -> Array:
    return np.clip(pixels, 0, 1) * 255


def _power_of_two(side: int) -> int:
    return 1 << max(side - 1, 1).bit_length()


TRANSFORMS: Mapping[str, Transform] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
    "saturate": _saturate,
}
"""Corruption -> function of an image, the constant of its severity and random numbers."""
