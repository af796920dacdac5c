"""Random views of image batches: the augmentation of adversarial contrastive learning, batched and on the device.

Every image draws its own parameters, as in a data loader that augments one image at a time, but a few tensor
operations serve the whole batch, on the device that holds it. The arithmetic is that of Pillow on uint8 images
(whole-pixel crops, antialiased resampling, whole levels after every operation): a view equals the one torchvision
makes of a PIL image with the same parameters, up to isolated pixels on a rounding edge. Resampling runs along the rows
first, then along the columns, as in Pillow up to version 12; Pillow 13 begins with the columns for some tall crops.

Source: "small_scale_datasets/DynACL_RCS.py" of the released code (strength 1 = ACL) and torchvision on PIL images.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hf_robust.crops import (
    TRIES,
    crop_resize,
    padded_crop,
    resize_whole,
    resized_crop,
    sample_crops,
)
from hf_robust.frequencies import high_pass

INTERPOLATIONS = ("bicubic", "bilinear")
_CROPS = {"padded_crop": padded_crop, "resized_crop": resized_crop}
_BASE = {"high_frequency": "padded_crop"}  # a view that is made of another one
_FIXED = ("original", *_CROPS, *_BASE)  # all other names begin with view_
_CHUNK_VALUES = 256 * 3 * 32 * 32  # enough to amortise the dispatch of an operation, little enough for the caches


@dataclass(frozen=True)
class ViewParameters:
    """What `apply_parameters` does to each image of a batch; every field has one row per image.

    Args:
        top, left, height, width (int64, pixels): first row, first column, rows and columns of the crop.
        flip (bool): whether the view is mirrored left to right.
        jitter (bool): whether the four colour operations are applied.
        brightness, contrast, saturation (float32): factors of the blends with black, mean grey, grey image; 1 = none.
        hue (float32, turns): rotation of the hue, in [-0.5, 0.5].
        order (int64, `(N, 4)`): order of the colour operations; 0 brightness, 1 contrast, 2 saturation, 3 hue.
        gray (bool): whether the view ends as a grey image of three equal channels.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    jitter: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    gray: Tensor

    def __len__(self) -> int:
        return len(self.top)

    def __getitem__(self, rows: slice | Tensor) -> ViewParameters:
        return ViewParameters(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def sample_parameters(
    n: int,
    *,
    image_size: tuple[int, int],
    strength: float = 1.0,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    minimal_area: float = 0.1,
) -> ViewParameters:
    """Independent random augmentation parameters for each of `n` images.

    The crop covers a share of the area uniform in `(1 - (1 - minimal_area) strength, 1)`, with an aspect ratio
    log-uniform in (3/4, 4/3): the first of ten tries that fits, else the largest central crop of an allowed ratio. The
    probability of a flip is 0.5 at every strength, of grey `0.2 strength`, of colour jitter `0.8 strength`:
    brightness, contrast and saturation by factors uniform in `1 -+ 0.4 strength`, hue by up to `0.1 strength`, in
    random order.

    At strength 0 the area is the full one and the ratio is still drawn, as in torchvision. A full-area crop fits only
    at the image's own ratio, so a try gives the whole image (less a column or row lost to rounding, if not square) or
    fails, and the fallback is the whole image if its ratio is in [3/4, 4/3], else a central crop: no zoom in any case.

    Args:
        n (`int`, images, >= 0): number of images.
        image_size (`tuple[int, int]`, pixels, >= 1): height and width of the images.
        strength (`float`, in [0, 1], default 1.0 = ACL): scales every range and probability but the flip's; takes
            no part in drawing the random numbers, so that equal seeds give views that differ in strength only.
        device (`torch.device`, default the generator's, else the CPU): where the parameters are needed.
        generator (`torch.Generator`, default the device's global one): source of randomness, of any device.
        minimal_area (`float`, in (0, 1], default 0.1 = ACL): smallest share of the area at strength 1.

    Returns:
        `ViewParameters` with `n` rows.

    Raises:
        ValueError: `strength` is outside [0, 1] or `image_size` has an empty side.

    Source: the released pre-training scripts and torchvision's `RandomResizedCrop`.
    """
    _check_sampling(image_size, strength)
    device = device or (generator.device if generator else "cpu")
    source = generator.device if generator else device
    # One call for all numbers: one kernel, and the same numbers at every strength.
    draws = torch.rand(n, 2 * TRIES + 13, generator=generator, device=source, dtype=torch.float32).to(device)
    crop_draws, draws = draws.split((2 * TRIES + 2, 11), dim=1)
    factors = 1 + (2 * draws[:, 2:5] - 1) * (0.4 * strength)
    return ViewParameters(
        *sample_crops(crop_draws, image_size, minimal_area=1 - (1 - minimal_area) * strength),
        flip=draws[:, 0] < 0.5,
        jitter=draws[:, 1] < 0.8 * strength,
        brightness=factors[:, 0],
        contrast=factors[:, 1],
        saturation=factors[:, 2],
        hue=(2 * draws[:, 5] - 1) * (0.1 * strength),
        order=draws[:, 6:10].argsort(dim=1),
        gray=draws[:, 10] < 0.2 * strength,
    )


def apply_parameters(
    images: Tensor,
    parameters: ViewParameters,
    *,
    size: int,
    interpolation: str = "bicubic",
    colors_first: bool = False,
) -> Tensor:
    """Crop, resize, flip, jitter the colours and grey, each image with its own parameters.

    On the CPU an operation runs on the images that need it; on an accelerator all run on all images and `torch.where`
    picks, so that no shape depends on the data and the host never waits. Both give the same views, also in autocast.

    Args:
        images (uint8, `(N, 3, H, W)`): the images; any height and width.
        parameters (`ViewParameters`): what to do with each image; crops must lie inside the images.
        size (`int`, pixels, >= 1): height and width of the views.
        interpolation (`str`, default "bicubic" = ACL, RCS, AIR): "bicubic" or "bilinear", antialiased as in Pillow.
        colors_first (`bool`, default False): jitter and grey the whole image before it is cropped (RoCL). The contrast
            then changes around the mean of the whole image.

    Returns:
        `torch.Tensor` of shape `(N, 3, size, size)`, float32, in [0, 1] (multiples of 1/255).

    Raises:
        TypeError: `images` are not uint8.
        ValueError: `images` are not `(N, 3, H, W)`, `size` < 1, unknown `interpolation`, not one row per image.
    """
    _check_images(images)
    _check_target(size, interpolation)
    if len(parameters) != len(images):
        rows = f"got {len(parameters)} rows for {len(images)} images"
        raise ValueError(f"every image needs its own parameters, {rows}: use sample_parameters(len(images), ...)")
    apply = _apply_grouped if images.device.type == "cpu" else _apply_masked
    return apply(images, parameters, size, interpolation, colors_first)


@dataclass(frozen=True)
class Views:
    """Named views of image batches, made on the device that holds the images.

    Args:
        size (`int`, pixels, >= 1): height and width of every view, the input size of the network.
        interpolation (`str`, default "bicubic" = ACL, RCS, AIR): "bicubic" or "bilinear" (official DynACL).
        minimal_area (`float`, in (0, 1], default 0.1 = ACL): smallest share of the image in a random view; AdvCL 0.2,
            RoCL 0.08.
        colors_first (`bool`, default False): change the colours of random views before they are cropped (RoCL).

    Raises:
        ValueError: `size` is less than 1, `interpolation` is unknown or `minimal_area` out of range.
    """

    size: int
    interpolation: str = "bicubic"
    minimal_area: float = 0.1
    colors_first: bool = False

    def __post_init__(self) -> None:
        _check_target(self.size, self.interpolation)
        if not 0 < self.minimal_area <= 1:
            raise ValueError(f"minimal_area must be in (0, 1], got {self.minimal_area}: ACL takes 0.1, AdvCL 0.2")

    def __repr__(self) -> str:
        # Checkpoints are compared by this text: those written before there were these two still resume.
        late = ("minimal_area", "colors_first")
        shown = [f for f in fields(self) if f.name not in late or getattr(self, f.name) != f.default]
        return f"Views({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def __call__(
        self, images: Tensor, names: Sequence[str], *, strength: float = 1.0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Make the named views of every image.

        Args:
            images (uint8, `(N, 3, H, W)`): the images; any height and width.
            names (`Sequence[str]`): "view_1", "view_2", any "view_...": random views, drawn in the order of the
                names; "padded_crop", "resized_crop": crops without colours, see `hf_robust.crops`; "original": the
                image without augmentation, which takes no random number. If it is not of the size, its short side
                is resized to `size` and the centre cut out (as `Resize` and `CenterCrop` do); "high_frequency": the
                "padded_crop" of the same batch, which must be named before it, without its low frequencies.
            strength (`float`, in [0, 1], default 1.0 = ACL): strength of the random views, see `sample_parameters`.
            generator (`torch.Generator`, default the device's global one): source of randomness.

        Returns:
            `dict[str, torch.Tensor]`: for each name a float32 tensor `(N, 3, size, size)` in [0, 1]; of both signs
            for "high_frequency".

        Raises:
            TypeError: `images` are not uint8.
            ValueError: a name is unknown or stands before the view it is made of, `images` are not `(N, 3, H, W)` or
                `strength` is outside [0, 1].
        """
        _check_images(images)
        _check_names(names)
        n, shape = len(images), (images.shape[2], images.shape[3])
        _check_sampling(shape, strength)
        views = {}
        for name in names:
            if name == "original":
                views[name] = resize_whole(images, self.size, self.interpolation)
                continue
            if name in _CROPS:
                views[name] = _CROPS[name](images, self.size, interpolation=self.interpolation, generator=generator)
                continue
            if name in _BASE:
                views[name] = high_pass(views[_BASE[name]], self.size / 4)  # published: 8 at 32 pixels
                continue
            drawn = sample_parameters(
                n,
                image_size=shape,
                strength=strength,
                device=images.device,
                generator=generator,
                minimal_area=self.minimal_area,
            )
            views[name] = apply_parameters(
                images, drawn, size=self.size, interpolation=self.interpolation, colors_first=self.colors_first
            )
        return views


def _crop(images: Tensor, parameters: ViewParameters, size: int, interpolation: str) -> Tensor:
    """Whole levels of the crops, resized and flipped."""
    crops = (parameters.top, parameters.left, parameters.height, parameters.width)
    return crop_resize(images, crops, parameters.flip, size, interpolation)


def _apply_grouped(
    images: Tensor, parameters: ViewParameters, size: int, interpolation: str, colors_first: bool
) -> Tensor:
    """Make the views, each operation on the images that need it (shapes depend on the data: for the CPU)."""
    views = torch.empty(len(images), 3, size, size, dtype=torch.float32, device=images.device)
    chunk = max(1, _CHUNK_VALUES // max(3 * size * size, images[:1].numel()))
    for start in range(0, len(images), chunk):
        part, levels = parameters[start : start + chunk], images[start : start + chunk]
        if colors_first:
            levels = _crop(_colour_grouped(levels.float(), part), part, size, interpolation)
        else:
            levels = _colour_grouped(_crop(levels, part, size, interpolation), part)
        torch.div(levels, 255, out=views[start : start + chunk])
    return views


def _apply_masked(
    images: Tensor, parameters: ViewParameters, size: int, interpolation: str, colors_first: bool
) -> Tensor:
    """Make the views, all operations on all images and the needed ones picked (fixed shapes: for accelerators)."""
    if colors_first:
        return _crop(_colour_masked(images.float(), parameters), parameters, size, interpolation) / 255
    return _colour_masked(_crop(images, parameters, size, interpolation), parameters) / 255


def _colour_grouped(levels: Tensor, parameters: ViewParameters) -> Tensor:
    """Jitter and grey those images that are to be, overwriting them."""
    for chosen, operation, amount in _colour_steps(parameters):
        rows = chosen.nonzero()[:, 0]
        if len(rows) > 0:
            levels[rows] = _change_colour(levels[rows], operation, amount[rows])
    rows = parameters.gray.nonzero()[:, 0]
    levels[rows] = _grayscale(levels[rows]).expand(-1, 3, -1, -1)
    return levels


def _colour_masked(levels: Tensor, parameters: ViewParameters) -> Tensor:
    for chosen, operation, amount in _colour_steps(parameters):
        levels = torch.where(chosen[:, None, None, None], _change_colour(levels.clone(), operation, amount), levels)
    return torch.where(parameters.gray[:, None, None, None], _grayscale(levels), levels)


def _colour_steps(parameters: ViewParameters) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Which images take an operation next, the operation, its amount `(N, 1, 1, 1)`; an image is in four steps."""
    amounts = torch.stack([parameters.brightness, parameters.contrast, parameters.saturation, parameters.hue])
    for codes in parameters.order.unbind(dim=1):
        for operation, amount in enumerate(amounts[..., None, None, None]):
            yield parameters.jitter & (codes == operation), operation, amount


def _change_colour(levels: Tensor, operation: int, amount: Tensor) -> Tensor:
    """One colour operation (code of `ViewParameters.order`) on all images, overwriting them."""
    if operation == 3:
        return _turn_hue(levels, amount)
    if operation == 0:
        levels.mul_(amount)
    else:
        base = _grayscale(levels)
        if operation == 1:
            base = base.mean(dim=(2, 3), keepdim=True).add_(0.5).floor_()
        levels.sub_(base).mul_(amount).add_(base)
    return levels.clamp_(0, 255).floor_()


def _grayscale(levels: Tensor) -> Tensor:
    """Grey levels `(N, 1, H, W)`: ITU-R 601 luma in 16-bit fixed point, exact in float32 (all sums below 2^24)."""
    red, green, blue = levels.split(1, dim=1)
    luma = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768)
    return luma.mul_(1 / 65536).floor_()


def _turn_hue(levels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue, overwriting the images, through a hue and a saturation of 256 levels (Pillow's HSV mode).

    `position` is the hue in sixths of a turn times the chroma, so `42.5 position / chroma` is the hue's level. Back in
    RGB, a channel lies below the value by value * saturation * (distance of the hue from the channel's own hue in
    sixths, less 1, cut to [0, 1]).
    """
    red, green, blue = levels.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Where channels tie for the largest, red goes before green and green before blue.
    position = (red - green).add_(chroma, alpha=4)
    position = torch.where(green == value, (blue - red).add_(chroma, alpha=2), position)
    position = torch.where(red == value, green - blue, position)
    position += chroma * (position < 0) * 6
    hue = position.mul_(42.5).div_(chroma.clamp_min(1)).floor_().add_(torch.trunc(turns * 255))
    hue -= (hue / 256).floor_().mul_(256)  # wraps around as a byte
    sixths = hue.mul_(6).div_(255)
    depth = chroma.mul_(255).div_(value.clamp_min(1)).floor_().mul_(value).div_(255)
    for channel, own in enumerate((3, 2, 4)):
        share = (sixths - own).abs_().sub_(1).clamp_(0, 1)
        if channel == 0:
            share = 1 - share  # red is at both ends of the scale: measured from its opposite
        torch.sub(value, share.mul_(depth), out=levels[:, channel : channel + 1])
    return levels.round_()


def _check_sampling(image_size: tuple[int, int], strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}: write 1 for the full augmentation of ACL")
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size must be (height, width) in pixels, got {image_size}: pass images.shape[-2:]")


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8:
        way_out = "convert floats in [0, 1] with (images * 255).round().to(torch.uint8)"
        raise TypeError(f"images must be uint8 (levels 0 to 255), got {images.dtype}: {way_out}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        way_out = "images[None] adds a batch, images.expand(-1, 3, -1, -1) repeats a grey channel"
        raise ValueError(f"images must be (N, 3, H, W), got {tuple(images.shape)}: {way_out}")


def _check_target(size: int, interpolation: str) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}: write the input size of the network, e.g. 32")
    _check_word("interpolation", interpolation, interpolation in INTERPOLATIONS, INTERPOLATIONS)


def _check_names(names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"names must be a sequence of view names, got the string {names!r}: write [{names!r}]")
    for place, name in enumerate(names):
        if name in _BASE and _BASE[name] not in names[:place]:
            raise ValueError(
                f"the view {name!r} is made of {_BASE[name]!r}: name that one before it, got {list(names)}"
            )
        _check_word("view", name, name in _FIXED or name.startswith("view_"), ("view_1", "view_2", *_FIXED))


def _check_word(kind: str, word: str, valid: bool, known: Sequence[str]) -> None:
    if not valid:
        close = difflib.get_close_matches(word, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown {kind} {word!r}: known are {', '.join(known)}{hint}")
