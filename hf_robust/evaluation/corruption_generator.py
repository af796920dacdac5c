"""Common corruptions of any image and of any data set, with the constants of CIFAR-10-C or of ImageNet-C."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray

from ..data import ImageDataset
from .accuracy import progress_bar
from .corruption_constants import CORRUPTIONS, EXTRA, constant_of
from .corruption_images import TRANSFORMS, Textures, frost

__all__ = ["CorruptedImages", "corrupt", "corrupt_dataset", "default_constants"]

SMALLEST_SIDE = 8
IMAGENET_FROM = 64  # pixels


def corrupt(
    image: NDArray[np.uint8],
    name: str,
    severity: int,
    constants: str = "cifar",
    seed: int = 0,
    *,
    frost_textures: Textures | None = None,
) -> NDArray[np.uint8]:
    """Corrupt one image, of any size, the same way every time.

    With the constants and the seed of the released generators the result is theirs, level for level (frost: with
    their textures).

    Args:
        image (`ndarray` of shape `(H, W, 3)`): uint8 RGB, at least 8 x 8.
        name (`str`): one of `CORRUPTIONS` or `EXTRA`.
        severity (`int`): 1 to 5.
        constants (`str`, defaults to `"cifar"`): `"cifar"`, made for 32-pixel images, or `"imagenet"`, much stronger
            and made for 224. Lengths are in pixels and do not grow with the image.
        seed (`int`, defaults to 0): of the random numbers, 0 to 2**32 - 1; the global random state is not touched.
        frost_textures (`Sequence[ndarray]`, *optional*): photographs of ice, see [`read_frost_textures`].

    Returns:
        `ndarray` of shape `(H, W, 3)`: uint8.

    Raises:
        ValueError: for an unknown name (the nearest ones are listed), severity or table, a seed out of range, or an
            image of another type or layout.

    Source: Hendrycks and Dietterich, ICLR 2019; see `corruption_images`.
    """
    constant = constant_of(constants, name, severity)
    layout_ok = isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3
    if not layout_ok or image.dtype != np.uint8 or min(image.shape[:2]) < SMALLEST_SIDE:
        found = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise ValueError(
            f"corrupt needs a uint8 array (H, W, 3), {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels or more, got {found}: "
            "of a tensor (3, H, W) write image.permute(1, 2, 0).numpy(), of floats in [0, 1] first times 255 and to "
            "uint8, of a grey image np.repeat(image[..., None], 3, -1)"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {seed}: 0 is the default")
    rng = RandomState(seed)
    if name == "frost":
        levels = frost(image, constant, rng, frost_textures)
    else:
        levels = TRANSFORMS[name](image, constant, rng)
    return levels.astype(np.uint8)  # cut off, not rounded: as published


def corrupt_dataset(
    dataset: ImageDataset,
    name: str,
    severity: int,
    constants: str | None = None,
    seed: int = 0,
    progress: bool = False,
    *,
    frost_textures: Textures | None = None,
) -> ImageDataset:
    """Corrupt every image of a data set, into memory.

    Args:
        dataset ([`ImageDataset`]): any; labels and names are kept.
        name (`str`): one of `CORRUPTIONS` or `EXTRA`.
        severity (`int`): 1 to 5.
        constants (`str`, *optional*): `"cifar"` or `"imagenet"`; default: by the size of the images, `"cifar"` below
            64 pixels.
        seed (`int`, defaults to 0): the random numbers of an image depend on seed, corruption, severity and its
            position, on nothing else.
        progress (`bool`, defaults to `False`): show a bar when it takes more than a few seconds.
        frost_textures (`Sequence[ndarray]`, *optional*): photographs of ice, see [`read_frost_textures`].

    Returns:
        [`ImageDataset`]: as many images of the same size.

    Raises:
        ValueError: as [`corrupt`] does.
    """
    corrupted = CorruptedImages(dataset, name, severity, constants, seed, frost_textures)
    images = torch.empty((len(dataset), 3, *dataset.image_size), dtype=torch.uint8)
    with progress_bar(len(dataset), corrupted.name, progress) as bar:
        for index in range(len(dataset)):
            images[index] = corrupted[index]["image"]
            bar.update()
    return ImageDataset(
        images,
        dataset.labels,
        dataset.label_names,
        name=corrupted.name,
        image_size=dataset.image_size,
        num_classes=dataset.num_classes,
    )


class CorruptedImages(ImageDataset):
    """The images of a data set, each corrupted when it is asked for: [`corrupt_dataset`] without the memory.

    The arguments are those of [`corrupt_dataset`].
    """

    def __init__(
        self,
        source: ImageDataset,
        name: str,
        severity: int,
        constants: str | None = None,
        seed: int = 0,
        frost_textures: Textures | None = None,
    ) -> None:
        table = constants or default_constants(source)
        constant_of(table, name, severity)
        super().__init__(
            None,
            source.labels,
            source.label_names,
            name=f"{source.name}, {name} {severity}",
            image_size=source.image_size,
            num_classes=source.num_classes,
        )
        self._source, self._what, self._textures = source, (name, severity, table), frost_textures
        self._key = [seed, (CORRUPTIONS + EXTRA).index(name), severity]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = dict(self._source[index])
        # One seed per image: neither batches nor processes nor the images before it matter.
        seed = int(np.random.SeedSequence([*self._key, int(index)]).generate_state(1, np.uint32)[0])
        pixels = np.ascontiguousarray(item["image"].permute(1, 2, 0).numpy())
        corrupted = corrupt(pixels, *self._what, seed, frost_textures=self._textures)
        item["image"] = torch.from_numpy(corrupted).permute(2, 0, 1).contiguous()
        return item


def default_constants(dataset: ImageDataset) -> str:
    """Choose the constants by the size of the images.

    Returns:
        `str`: `"cifar"` when the shorter side is below 64 pixels, else `"imagenet"`.
    """
    return "cifar" if min(dataset.image_size) < IMAGENET_FROM else "imagenet"
