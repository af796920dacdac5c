"""Any image source as one uint8 data set with columns image, label and index.

Images are decoded once into memory when they fit, and at access when they do not; either way an item is a uint8 tensor
(3, H, W) of one fixed size, and everything random about an image (crops, colours) happens later, in batches, in
``hf_robust.views``.

Pixels: images are turned upright as their EXIF orientation says. Grey, palette, CMYK and 1-bit images are
converted to RGB; transparency is composited over white; 16-bit grey is divided by 257 (float images: [0, 1] times
255).

Columns: the image column is the one of type `Image` (or `{"bytes", "path"}`, as other writers store it), the label
column the one of type `ClassLabel`, else an integer or string column called `label`, `labels` or (WebDataset) `cls`.
Among several, one called `image`, `img` or `images` (`label`, `labels`, `cls`) is taken; otherwise the error lists the
candidates.
Integer labels are class numbers as they stand, strings are numbered in sorted order of the strings in this split.
Labels that are all missing (null, -1 or empty) make an unlabelled set; labels that are partly missing are an
error.

Sizes: with `image_size=None` the native size if all images share one, else the median of the shorter sides, at
most 256 pixels (logged). An image of another size is resized (bicubic) to that shorter side and cropped in the
centre.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .image_decoding import EncodedImages, allocate, common_size, decode_all, to_tensor
from .image_sources import MOST_CLASSES, find_image_column, find_label_column, open_split, read_labels, unknown_split

if TYPE_CHECKING:
    import datasets

__all__ = ["ImageDataset", "collate_images", "epoch_order", "load_image_dataset"]


class ImageDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """uint8 images of one size, with or without labels, in memory or decoded at access.

    Made by [`load_image_dataset`] or [`ImageDataset.from_tensors`].

    Attributes:
        images (`Tensor` or `None`): uint8 (N, 3, H, W); `None` when the images are decoded at access.
        labels (`Tensor` or `None`): int64 (N,), 0 <= label < num_classes; `None` for an unlabelled set.
        label_names (`tuple[str, ...]` or `None`): name of every class, where the source has them.
        name (`str`): what the user asked for.
        image_size (`tuple[int, int]`): (H, W) of every item.
    """

    def __init__(
        self,
        images: Tensor | None,
        labels: Tensor | None = None,
        label_names: tuple[str, ...] | None = None,
        *,
        name: str,
        image_size: tuple[int, int],
        encoded: EncodedImages | None = None,
        num_classes: int | None = None,
        replaces_unreadable: bool = False,
    ) -> None:
        self.images, self.labels, self.label_names = images, labels, label_names
        self.name, self.image_size = name, image_size
        self._encoded, self._replaces_unreadable = encoded, replaces_unreadable
        if labels is not None and num_classes is None:
            num_classes = len(label_names) if label_names else int(labels.max()) + 1
        self._num_classes = None if labels is None else num_classes

    @classmethod
    def from_tensors(
        cls,
        images: Tensor,
        labels: Tensor | None = None,
        label_names: Sequence[str] | None = None,
        name: str = "tensors",
    ) -> ImageDataset:
        """Make a data set of tensors that are already decoded.

        Args:
            images (`Tensor`): uint8 (N, 3, H, W), not copied.
            labels (`Tensor`, *optional*): class of every image, integers (N,) from 0.
            label_names (`Sequence[str]`, *optional*): name of every class.
            name (`str`, defaults to `"tensors"`): how logs and cards call the set.

        Raises:
            `ValueError`: wrong type or shape, no image, a negative label, or a label without a name.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(
                f"images must be a non-empty uint8 tensor (N, 3, H, W), got {images.dtype} {tuple(images.shape)}: for "
                "floats in [0, 1] write (images * 255).round().to(torch.uint8), for grey images .repeat(1, 3, 1, 1)"
            )
        names = None if label_names is None else tuple(label_names)
        if labels is not None:
            if labels.shape != (len(images),) or labels.is_floating_point():
                raise ValueError(
                    f"labels must be {len(images)} integers, one per image, got {labels.dtype} {tuple(labels.shape)}: "
                    "pass labels.flatten().long(), or None for an unlabelled set"
                )
            labels = labels.long()
            limit = len(names) if names else MOST_CLASSES
            if int(labels.min()) < 0 or int(labels.max()) >= limit:
                raise ValueError(
                    f"labels must be in 0..{limit - 1}, got {int(labels.min())}..{int(labels.max())}: number the "
                    "classes from 0 and name every class, or pass labels=None for an unlabelled set"
                )
        height, width = images.shape[2:]
        return cls(images, labels, names, name=name, image_size=(height, width))

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the source, also those that a subset misses; `None` for an unlabelled set."""
        return self._num_classes

    def subset(self, indices: Sequence[int] | Tensor) -> ImageDataset:
        """Return the items at `indices`, in that order, as a data set of its own (`index` counts from 0 again).

        Args:
            indices (`Sequence[int]` or `Tensor`): positions in this data set, 0 <= index < len(self).

        Raises:
            `ValueError`: an index out of range, or no index at all.
        """
        chosen = torch.as_tensor(indices).flatten()
        # A mask read as indices would quietly give copies of items 0 and 1.
        whole = not chosen.is_floating_point() and chosen.dtype != torch.bool
        if not whole or not len(chosen) or int(chosen.min()) < 0 or int(chosen.max()) >= len(self):
            shown = f"{chosen.dtype} {chosen.tolist()[:5]}"
            raise ValueError(
                f"a subset needs integers in 0..{len(self) - 1}, at least one, got {shown}...: pass positions in this "
                "data set (of a mask: mask.nonzero())"
            )
        return ImageDataset(
            None if self.images is None else self.images[chosen],
            None if self.labels is None else self.labels[chosen],
            self.label_names,
            name=self.name,
            image_size=self.image_size,
            encoded=None if self._encoded is None else self._encoded.select(chosen.tolist()),
            num_classes=self._num_classes,
            replaces_unreadable=self._replaces_unreadable,
        )

    def relabelled(self, labels: Tensor, label_names: Sequence[str] | None = None) -> ImageDataset:
        """Return the same images with other labels.

        Args:
            labels (`Tensor`): class of every image, integers (N,) from 0.
            label_names (`Sequence[str]`, *optional*): name of every class.

        Raises:
            `ValueError`: another number of labels than of images, or a negative one.
        """
        labels = labels.long()
        if labels.shape != (len(self),) or int(labels.min()) < 0:
            raise ValueError(
                f"labels must be {len(self)} integers from 0, one per image, got shape {tuple(labels.shape)} from "
                f"{int(labels.min()) if labels.numel() else 'nothing'}"
            )
        names = None if label_names is None else tuple(label_names)
        return ImageDataset(
            self.images,
            labels,
            names,
            name=self.name,
            image_size=self.image_size,
            encoded=self._encoded,
            replaces_unreadable=self._replaces_unreadable,
        )

    def numbered_as(self, other: ImageDataset) -> ImageDataset:
        """Return the same images with the classes of another split, matched by name where both have names.

        A split that lacks a class numbers the others anew when its source stores names as text.

        Args:
            other (`ImageDataset`): labelled; its numbers count.

        Raises:
            `ValueError`: a class that the other split does not have, or no labels.
        """
        if self.labels is None or other.labels is None:
            raise ValueError(f"classes of {self.name!r} and {other.name!r} cannot be matched: one has no labels")
        if not self.label_names or not other.label_names or self.label_names == other.label_names:
            if int(self.labels.max()) >= (other.num_classes or 0):
                raise ValueError(
                    f"{self.name!r} has the class {int(self.labels.max())}, the training images have "
                    f"{other.num_classes} classes: use splits of one data set"
                )
            return self
        unknown = sorted(set(self.label_names) - set(other.label_names))
        if unknown:
            raise ValueError(
                f"{self.name!r} has the classes {unknown[:5]} that the training images do not have "
                f"({', '.join(other.label_names[:5])} ...): use splits of one data set"
            )
        numbers = torch.tensor([other.label_names.index(name) for name in self.label_names])
        return self.relabelled(numbers[self.labels], other.label_names)

    def __len__(self) -> int:
        if self.images is not None:
            return len(self.images)
        return 0 if self._encoded is None else len(self._encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}: the data set has {len(self)} items")
        item: dict[str, Any] = {}
        if self.images is not None:
            item["image"] = self.images[index]
        elif self._encoded is not None and self._replaces_unreadable:
            index, pixels = self._encoded.decode_or_next(index, self.image_size)
            item["image"] = to_tensor(pixels)
        elif self._encoded is not None:
            item["image"] = to_tensor(self._encoded.decode(index, self.image_size))
        item["index"] = index
        if self.labels is not None:
            item["label"] = int(self.labels[index])
        return item

    def __repr__(self) -> str:
        classes = "unlabelled" if self.labels is None else f"{self.num_classes} classes"
        height, width = self.image_size
        where = "decoded at access" if self.images is None else "in memory"
        return f"ImageDataset({self.name!r}, {len(self)} images 3 x {height} x {width}, {classes}, {where})"


def collate_images(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack items of an [`ImageDataset`] into a batch.

    Returns:
        `dict[str, Tensor]`: `image` uint8 (N, 3, H, W), `index` int64 (N,) and, if labelled, `label` int64 (N,).
    """
    batch = {
        "image": torch.stack([item["image"] for item in items]),
        "index": torch.tensor([item["index"] for item in items], dtype=torch.int64),
    }
    if "label" in items[0]:
        batch["label"] = torch.tensor([item["label"] for item in items], dtype=torch.int64)
    return batch


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """Draw the permutation of an epoch: a function of its arguments and of nothing else.

    Args:
        length (`int`): number of items.
        seed (`int`): non-negative.
        epoch (`int`): non-negative.

    Returns:
        `torch.Tensor` of shape `(length,)`, int64.
    """
    # SeedSequence mixes the pair; seed + epoch would give (0, 1) and (1, 0) the same order.
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint32)[0])
    return torch.randperm(length, generator=torch.Generator().manual_seed(mixed))


def load_image_dataset(
    name: str | os.PathLike[str] | datasets.Dataset | datasets.DatasetDict,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    *,
    image_size: int | None = None,
    on_error: str = "raise",
    memory_budget: int = 4 * 2**30,
    max_examples: int | None = None,
    seed: int = 0,
    check_images: bool = True,
) -> ImageDataset:
    """Load images of any source, mode and size as uint8 RGB images of one size.

    How pixels, columns and sizes are treated is said at the top of this module.
    Every image is decoded once at load, also when the set is too large for memory and will be decoded again at access:
    a broken file shows here and not hours into a run. `check_images=False` saves that for sets of millions of images.

    Larger than memory: the table of a folder of parquet, arrow or tar files is mapped, not read (`datasets` writes it
    once to its cache on the disk), and an item is decoded by whoever asks for it, such as a worker of a `DataLoader`.

    Args:
        name (`str`, path, `datasets.Dataset` or `datasets.DatasetDict`): a Hub id (`"repo:config"` names one of
            several configurations); a folder of parquet, arrow, WebDataset tar or image files, or one written by
            `save_to_disk`; or `"digits"`, 1,797 real 8 x 8 grey digits of scikit-learn, resized to 32 x 32 (or
            `image_size`), splits `train` (1,437), `test` (360), `all`. Sub-folders of an image folder are its classes;
            fewer than two: unlabelled. A folder on this machine goes before a Hub id. Formats and transforms set on a
            `Dataset` are ignored.
        split (`str`, defaults to `"train"`): split; for folders and Hub ids also `"train[:10%]"` or `"train+test"`. A
            single `Dataset` has no splits: it is taken as it is, and asking it for any split but `train` is an error.
        image_column (`str`, *optional*): column of images, encoded bytes or file paths.
        label_column (`str`, *optional*): column of labels; `"none"` loads the set without labels.
        image_size (`int`, *optional*): side in pixels of the square images wanted.
        on_error (`str`, defaults to `"raise"`): `"skip"` drops images that cannot be read, with one logged warning.
        memory_budget (`int`, defaults to 4 GiB): bytes of uint8 images up to which the set is held in memory.
        max_examples (`int`, *optional*): keep a random subset of this size, chosen before decoding: stratified (every
            class in its proportion, and none lost as long as there is room) when labelled, else uniform.
        seed (`int`, defaults to 0): seed of that subset, which for one seed is nested in every larger one.
        check_images (`bool`, defaults to `True`): decode every image now, to find the broken ones, also of a set that
            is decoded at access. `False`: a broken image shows when it is asked for, as an error that names its row
            or, with `on_error="skip"`, as the next readable image in its place (logged; the item's `index` and
            `label` are those of that one). Without effect on a set that fits `memory_budget`.

    Returns:
        [`ImageDataset`]

    Raises:
        `FileNotFoundError`: `name` is neither a folder nor a data set that the Hub gives out.
        `ValueError`: an unreadable image, no or ambiguous columns, unknown split or column, an empty set, unusable
            labels, or an argument out of range.
    """
    _check_arguments(image_size, on_error, max_examples)
    if isinstance(name, str) and name == "digits":
        return _load_digits(split, image_size or 32, max_examples, seed)
    table = open_split(name, split)
    shown = str(name) if isinstance(name, str | os.PathLike) else str(table.info.dataset_name or "dataset")
    if not len(table):
        raise ValueError(
            f"{shown!r} split {split!r} is empty: a data set needs at least one image, name another split"
        )
    image_column = find_image_column(table.features, image_column, shown)
    label_column = find_label_column(table.features, label_column, shown)
    labels, label_names, num_classes = read_labels(table, label_column, shown)
    encoded = EncodedImages.from_table(table, image_column, shown)
    if max_examples is not None and max_examples < len(table):
        chosen = _choose(len(table), labels, max_examples, seed)
        encoded = encoded.select(chosen.tolist())
        labels = None if labels is None else labels[chosen]
    size = (image_size, image_size) if image_size is not None else common_size(encoded, sampled=not check_images)
    images = allocate(encoded, size, memory_budget)
    looks = check_images or images is not None
    kept = decode_all(encoded, size, images, on_error) if looks else range(len(encoded))
    if len(kept) < len(encoded):
        images = None if images is None else images[kept]
        labels = None if labels is None else labels[kept]
        encoded = encoded.select(kept)
    streamed = encoded if images is None else None
    return ImageDataset(
        images,
        labels,
        label_names,
        name=shown,
        image_size=size,
        encoded=streamed,
        num_classes=num_classes,
        replaces_unreadable=on_error == "skip" and not looks,
    )


def _check_arguments(image_size: int | None, on_error: str, max_examples: int | None) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}: "skip" drops unreadable images')
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size must be a side in pixels >= 1, got {image_size!r}: None keeps the native size")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be >= 1, got {max_examples}: None takes every example")


def _load_digits(split: str, size: int, max_examples: int | None, seed: int) -> ImageDataset:
    """UCI hand-written digits as shipped with scikit-learn; the train/test cut is stratified and always the same."""
    from sklearn.datasets import load_digits

    if split not in ("train", "test", "all"):
        unknown_split("digits", split, ("train", "test", "all"))
    source = load_digits()
    labels = torch.from_numpy(source.target).long()
    images = torch.from_numpy(source.images).float().unsqueeze(1) * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).repeat(1, 3, 1, 1)
    in_test = torch.zeros(len(labels), dtype=torch.bool)
    in_test[_choose(len(labels), labels, 360, seed=0)] = True
    if split != "all":
        keep = in_test if split == "test" else ~in_test
        images, labels = images[keep], labels[keep]
    whole = ImageDataset.from_tensors(images, labels, [str(digit) for digit in range(10)], name="digits")
    if max_examples is None or max_examples >= len(whole):
        return whole
    return whole.subset(_choose(len(whole), labels, max_examples, seed))


def _choose(count: int, labels: Tensor | None, size: int, seed: int) -> Tensor:
    """`size` of `count` positions in rising order: stratified when labelled, nested over `size` for one seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        # The r-th of a class with c members has the key r / c: the smallest keys take every class in proportion, and
        # every class once before any twice.
        shuffled = labels[order].numpy()
        by_class = np.argsort(shuffled, kind="stable")
        counts = np.bincount(shuffled)
        rank = np.empty(count, dtype=np.int64)
        rank[by_class] = np.arange(count) - (np.cumsum(counts) - counts)[shuffled[by_class]]
        order = order[torch.from_numpy(np.argsort(rank / counts[shuffled], kind="stable"))]
    return order[:size].sort().values
