"""Crops of image batches, every image with its own: sampling, resampling, and two views made of crops alone.

Resampling is Pillow's on uint8 images (antialiased, whole levels after each of its two products), as two batched
matrix products on the device that holds the images; see `hf_robust.views`, whose random views begin with it.
"""

from __future__ import annotations

import contextlib
import math
from functools import reduce

import torch
from torch import Tensor

__all__ = ["Crops", "crop_resize", "padded_crop", "resize_whole", "resized_crop", "sample_crops", "shift_flip"]

Crops = tuple[Tensor, Tensor, Tensor, Tensor]  # top, left, height and width in pixels, `(N,)` each
TRIES = 10
_RATIO = 4 / 3  # the widest; the narrowest is its inverse
_CHUNK_VALUES = 2**24  # float32 values of the largest tensor while a batch is resampled: 64 MiB


def padded_crop(
    images: Tensor, size: int, *, interpolation: str = "bicubic", generator: torch.Generator | None = None
) -> Tensor:
    """Shift each image by up to 4 pixels, with black where it leaves, and flip every second one.

    Images of another size are resized first, as the view "original" is.

    Args:
        images (uint8, `(N, 3, H, W)`): the images.
        size (`int`, pixels): height and width of the crops; below 32 the padding is an eighth of it.
        interpolation (`str`, default "bicubic"): "bicubic" or "bilinear"; of images that must be resized.
        generator (`torch.Generator`, default the device's global one): source of randomness, of any device.

    Returns:
        `torch.Tensor` of shape `(N, 3, size, size)`, float32, in [0, 1].

    Source: He et al. 2016 on CIFAR; released SAT on ImageNet-32, `RandomCrop(32, padding=4)` and a flip; the
        same padding at 96 pixels in RobustSSL_Benchmark@19dc714.
    """
    padding = min(4, size // 8)
    draws = _uniform(len(images), 3, images.device, generator)
    top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(dim=1)
    return shift_flip(resize_whole(images, size, interpolation), top, left, draws[:, 2] < 0.5, padding)


def resized_crop(
    images: Tensor, size: int, *, interpolation: str = "bicubic", generator: torch.Generator | None = None
) -> Tensor:
    """Cut 8 to 100 % of the area of each image at a random ratio, resize it and flip every second one; no colours.

    The release resizes to 256 pixels before and resamples bilinearly. Here the stored image is cut, and resampled once
    only: the shares of the area are the same; for its two resamplings load the data set at 256 pixels.

    Args:
        images (uint8, `(N, 3, H, W)`): the images; any height and width.
        size (`int`, pixels): height and width of the view.
        interpolation (`str`, default "bicubic"): "bicubic" or "bilinear".
        generator (`torch.Generator`, default the device's global one): source of randomness, of any device.

    Returns:
        `torch.Tensor` of shape `(N, 3, size, size)`, float32, in [0, 1] (multiples of 1/255).

    Source: torchvision's `RandomResizedCrop` with its defaults; released SAT on ImageNet at 224 pixels.
    """
    n, shape = len(images), (images.shape[2], images.shape[3])
    draws = _uniform(n, 2 * TRIES + 3, images.device, generator)
    top, left, height, width = sample_crops(draws[:, :-1], shape, minimal_area=0.08)
    flip = draws[:, -1] < 0.5
    views = torch.empty(n, 3, size, size, dtype=torch.float32, device=images.device)
    chunk = max(1, _CHUNK_VALUES // max(3 * size * size, images[:1].numel()))
    for rows in (slice(start, start + chunk) for start in range(0, n, chunk)):
        crops = (top[rows], left[rows], height[rows], width[rows])
        torch.div(crop_resize(images[rows], crops, flip[rows], size, interpolation), 255, out=views[rows])
    return views


def shift_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Pad with zeros and cut each image's own window of the old size, mirrored where asked.

    Args:
        images (`torch.Tensor` of shape `(N, C, S, S)`): any type.
        top, left (int64, `(N,)`, in [0, 2 padding]): the window's place in the padded image.
        flip (bool, `(N,)`): whether the window is mirrored left to right.
        padding (`int`, pixels): zeros on each side.

    Returns:
        `torch.Tensor`: of the same shape.
    """
    n, channels, size, _ = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    window = torch.arange(size, device=images.device)
    rows = top[:, None] + window
    columns = left[:, None] + torch.where(flip[:, None], window.flip(0), window)
    padded = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
    return padded.gather(3, columns[:, None, None, :].expand(-1, channels, size, -1))


def _uniform(n: int, columns: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    source = generator.device if generator else device
    return torch.rand(n, columns, generator=generator, device=source, dtype=torch.float32).to(device)


def sample_crops(draws: Tensor, image_size: tuple[int, int], minimal_area: float) -> Crops:
    """Turn uniform numbers into crops of a random share of the area and a random aspect ratio in (3/4, 4/3).

    The first try that fits inside the image is taken, else the largest central crop of an allowed ratio.

    Args:
        draws (`torch.Tensor` of shape `(N, 2 * TRIES + 2)`): in [0, 1): shares, log ratios, top, left.
        image_size (`tuple[int, int]`, pixels): height and width of the images.
        minimal_area (`float`, in [0, 1]): smallest share of the area; the largest is 1.

    Returns:
        `Crops`: int64, inside the image.

    Source: torchvision's `RandomResizedCrop`.
    """
    image_height, image_width = image_size
    area = image_height * image_width * (minimal_area + (1 - minimal_area) * draws[:, :TRIES])
    ratio = torch.exp(math.log(_RATIO) * (2 * draws[:, TRIES : 2 * TRIES] - 1))
    widths, heights = torch.sqrt(area * ratio).round_(), torch.sqrt(area / ratio).round_()
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)  # argmax names the first of equals
    found = fits.any(dim=1)
    # The fallback: the largest central crop of an allowed ratio.
    height = torch.where(found, heights.gather(1, first)[:, 0], min(image_height, round(image_width * _RATIO)))
    width = torch.where(found, widths.gather(1, first)[:, 0], min(image_width, round(image_height * _RATIO)))
    top = torch.where(found, draws[:, -2] * (image_height - height + 1), (image_height - height) / 2)
    left = torch.where(found, draws[:, -1] * (image_width - width + 1), (image_width - width) / 2)
    return top.long(), left.long(), height.long(), width.long()


def crop_resize(images: Tensor, crops: Crops, flip: Tensor, size: int, interpolation: str) -> Tensor:
    """Cut each image's crop, resize it to `(size, size)` and mirror it where asked.

    Args:
        images (uint8, `(N, 3, H, W)`): the images.
        crops (`Crops`): inside the images.
        flip (bool, `(N,)`): whether the crop is mirrored left to right.
        size (`int`, pixels): height and width of the result.
        interpolation (`str`): "bicubic" or "bilinear", antialiased as in Pillow.

    Returns:
        `torch.Tensor` of shape `(N, 3, size, size)`, float32, whole levels in [0, 255].
    """
    top, left, crop_height, crop_width = crops
    height, width = images.shape[2:]
    across = _resampling_weights(left, crop_width, width, size, interpolation, flip)
    down = _resampling_weights(top, crop_height, height, size, interpolation)
    return _resample(images, across[:, None], down[:, None])


def resize_whole(images: Tensor, size: int, interpolation: str) -> Tensor:
    """Resize the short side to `size` and cut the centre out, as `Resize` and `CenterCrop` do.

    Args:
        images (uint8, `(N, 3, H, W)`): the images.
        size (`int`, pixels): height and width of the result; images that have it are not resampled.
        interpolation (`str`): "bicubic" or "bilinear", antialiased as in Pillow.

    Returns:
        `torch.Tensor` of shape `(N, 3, size, size)`, float32, in [0, 1] (multiples of 1/255).
    """
    height, width = images.shape[2:]
    if height == width == size:
        return images.float() / 255
    weights, start = [], torch.zeros(1, device=images.device)
    for length in (width, height):
        scaled = size * length // min(height, width)
        margin = round((scaled - size) / 2)
        matrix = _resampling_weights(start, start + length, length, scaled, interpolation)
        weights.append(matrix[:, None, margin : margin + size])
    return _resample(images, *weights) / 255


def _resampling_weights(
    start: Tensor, length: Tensor, total: int, size: int, interpolation: str, flip: Tensor | None = None
) -> Tensor:
    """Matrices `(N, size, total)` that resample `length` of `total` pixels from `start` on to `size` pixels."""
    target = torch.arange(size, dtype=torch.float32, device=start.device)[:, None]
    if flip is not None:
        target = torch.where(flip[:, None, None], size - 1 - target, target)
    source = torch.arange(total, dtype=torch.float32, device=start.device) - start[:, None, None]
    length = length.float()[:, None, None]
    # Distance of pixel centres in units of the filter: a ratio of whole numbers, rounded only once.
    distance = ((2 * source + 1) * size - (2 * target + 1) * length).div_(2 * length.clamp_min(size)).abs_()
    if interpolation == "bilinear":
        weights = (1 - distance).clamp_min_(0)
    else:
        # Keys' cubic with a = -1/2, as a spline with knots at 1 and 2.
        inner, outer = (1 - distance).clamp_min_(0), (2 - distance).clamp_min_(0)
        weights = (outer - 1).mul_(0.5).mul_(outer).mul_(outer).add_((1 - 2 * inner).mul_(inner).mul_(inner))
    weights.mul_((source >= 0) & (source < length))  # nothing outside the crop takes part
    weights.div_(weights.sum(dim=2, keepdim=True))
    # Pillow's weights of 22 bits after the point: they decide the frequent ties between two levels.
    return weights.mul_(2**22).add_(0.5).floor_().mul_(2**-22)


def _resample(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Whole levels `(N, 3, size, size)`, rounded after each of the two products (halves up) as Pillow does."""
    device = images.device.type
    autocast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else None
    split = _tf32_parts if device != "cpu" else lambda weights: (weights,)
    with autocast or contextlib.nullcontext():
        levels = images.float()
        levels = reduce(torch.add, [levels @ part.mT for part in split(across)])
        levels = levels.add_(0.5).floor_().clamp_(0, 255)
        levels = reduce(torch.add, [part @ levels for part in split(down)])
        return levels.add_(0.5).floor_().clamp_(0, 255)


def _tf32_parts(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Two terms of the weights that both fit the 11 bits of TF32 (levels need 8), should products run in it."""
    coarse = (weights * 1024).round_().mul_(1 / 1024)
    return coarse, weights - coarse
