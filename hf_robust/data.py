"""Any image source as one uint8 data set with columns image, label and index.

Images are decoded once into memory when they fit, and at access when they do not; either way an item is a uint8 tensor
(3, H, W) of one fixed size, and everything random about an image (crops, colours) happens later, in batches, in
``hf_robust.views``.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

__all__ = ["EpochSampler", "ImageDataset", "collate_images", "load_image_dataset"]

_LARGEST_AUTOMATIC_SIZE = 256
_MOST_CLASSES = 100_000
_CHUNK = 128
_EXIF_ORIENTATION = 0x0112
_T = TypeVar("_T")


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
        encoded: _EncodedImages | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.images, self.labels, self.label_names = images, labels, label_names
        self.name, self.image_size = name, image_size
        self._encoded = encoded
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
            limit = len(names) if names else _MOST_CLASSES
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
        )

    def __len__(self) -> int:
        if self.images is not None:
            return len(self.images)
        return 0 if self._encoded is None else len(self._encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}: the data set has {len(self)} items")
        item: dict[str, Any] = {"index": index}
        if self.images is not None:
            item["image"] = self.images[index]
        elif self._encoded is not None:
            item["image"] = _to_tensor(self._encoded.decode(index, self.image_size))
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


class EpochSampler(torch.utils.data.Sampler[int]):
    """Shuffled indices whose order depends on (seed, epoch) and on nothing else.

    It neither reads nor moves a global random state, so that a resumed run sees the order of an uninterrupted one.

    Args:
        length (`int`): number of items, at least 1; also the number of indices per epoch.
        seed (`int`, defaults to 0): non-negative.

    Raises:
        `ValueError`: `length` below 1 or a negative seed.
    """

    def __init__(self, length: int, seed: int = 0) -> None:
        if length < 1 or seed < 0:
            raise ValueError(
                f"EpochSampler needs length >= 1 and seed >= 0, got length={length}, seed={seed}: pass len(dataset) "
                "of a data set that has items"
            )
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order the next iteration yields."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        # SeedSequence mixes the pair; seed + epoch would give (0, 1) and (1, 0) the same order.
        mixed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint32)[0])
        return iter(torch.randperm(self.length, generator=torch.Generator().manual_seed(mixed)).tolist())


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
) -> ImageDataset:
    """Load images of any source, mode and size as uint8 RGB images of one size.

    Pixels: images are turned upright as their EXIF orientation says. Grey, palette, CMYK and 1-bit images are
    converted to RGB; transparency is composited over white; 16-bit grey is divided by 257 (float images: [0, 1] times
    255).

    Columns: the image column is the one of type `Image` (or `{"bytes", "path"}`, as other writers store it), the label
    column the one of type `ClassLabel`, else an integer or string column called `label` or `labels`. Among several,
    one called `image`, `img` or `images` (`label` or `labels`) is taken; otherwise the error lists the candidates.
    Integer labels are class numbers as they stand, strings are numbered in sorted order of the strings in this split.
    Labels that are all missing (null, -1 or empty) make an unlabelled set; labels that are partly missing are an
    error.

    Sizes: with `image_size=None` the native size if all images share one, else the median of the shorter sides, at
    most 256 pixels (logged). An image of another size is resized (bicubic) to that shorter side and cropped in the
    centre.

    Every image is decoded once at load, also when the set is too large for memory and will be decoded again at access:
    a broken file shows here and not hours into a run.

    Args:
        name (`str`, path, `datasets.Dataset` or `datasets.DatasetDict`): a Hub id (`"repo:config"` names one of
            several configurations); a folder of parquet, arrow or image files, or one written by `save_to_disk`; or
            `"digits"`, 1,797 real 8 x 8 grey digits of scikit-learn, resized to 32 x 32 (or `image_size`), splits
            `train` (1,437), `test` (360) and `all`. Sub-folders of an image folder are its classes; fewer than two:
            unlabelled. A folder on this machine goes before a Hub id. Formats and transforms set on a `Dataset` are
            ignored.
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
    table = _open_split(name, split)
    shown = str(name) if isinstance(name, str | os.PathLike) else str(table.info.dataset_name or "dataset")
    if not len(table):
        raise ValueError(
            f"{shown!r} split {split!r} is empty: a data set needs at least one image, name another split"
        )
    image_column = _find_image_column(table.features, image_column, shown)
    label_column = _find_label_column(table.features, label_column, shown)
    labels, label_names, num_classes = _read_labels(table, label_column, shown)
    encoded = _EncodedImages.from_table(table, image_column, shown)
    if max_examples is not None and max_examples < len(table):
        chosen = _choose(len(table), labels, max_examples, seed)
        encoded = encoded.select(chosen.tolist())
        labels = None if labels is None else labels[chosen]
    size = (image_size, image_size) if image_size is not None else _common_size(encoded)
    images = _allocate(encoded, size, memory_budget)
    kept = _decode_all(encoded, size, images, on_error)
    if len(kept) < len(encoded):
        images = None if images is None else images[kept]
        labels = None if labels is None else labels[kept]
        encoded = encoded.select(kept)
    streamed = encoded if images is None else None
    return ImageDataset(
        images, labels, label_names, name=shown, image_size=size, encoded=streamed, num_classes=num_classes
    )


def _check_arguments(image_size: int | None, on_error: str, max_examples: int | None) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}: "skip" drops unreadable images')
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size must be a side in pixels >= 1, got {image_size!r}: None keeps the native size")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be >= 1, got {max_examples}: None takes every example")


# Sources ------------------------------------------------------------------------------------------------------------


def _load_digits(split: str, size: int, max_examples: int | None, seed: int) -> ImageDataset:
    """UCI hand-written digits as shipped with scikit-learn; the train/test cut is stratified and always the same."""
    from sklearn.datasets import load_digits

    if split not in ("train", "test", "all"):
        _unknown_split("digits", split, ("train", "test", "all"))
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


def _open_split(name: Any, split: str) -> datasets.Dataset:
    import datasets
    from huggingface_hub.errors import HFValidationError

    if isinstance(name, datasets.Dataset | datasets.DatasetDict):
        return _one_split(name, "the given data set", split)
    if not isinstance(name, str | os.PathLike):
        raise ValueError(
            f"a data set must be a Hub id, a folder, 'digits' or a datasets.Dataset, got {type(name).__name__}: "
            "for tensors use ImageDataset.from_tensors, for an IterableDataset make a Dataset of it first"
        )
    text, config = os.path.expanduser(os.fspath(name)), None
    if not os.path.exists(text) and ":" in text:
        text, config = text.rsplit(":", 1)
    folder = Path(text)
    if folder.is_file():
        raise ValueError(f"{text!r} is a file, a data set is a folder: pass {str(folder.parent)!r}, which holds it")
    if any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        return _one_split(datasets.load_from_disk(text), text, split)
    if not folder.exists() and (folder.is_absolute() or text.startswith(".") or text.count("/") > 1):
        _unknown_source(text, "it looks like a path")
    try:
        return datasets.load_dataset(text, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        if folder.is_dir():
            raise ValueError(
                f"the folder {text!r} holds no data files: put parquet, arrow or image files in it ({error})"
            ) from error
        _unknown_source(text, str(error).rstrip("."), error)
    except HFValidationError as error:
        _unknown_source(text, "not a valid Hub id", error)
    except ValueError as error:
        reason = " ".join(str(error).split())
        if reason.startswith("Unknown split"):
            _unknown_split(text, split, datasets.get_dataset_split_names(text, config), error)
        if "corresponds to no data" in reason:
            raise ValueError(f"{text!r} split {split!r} is empty: name another split or add images") from error
        if "Config name" in reason or "BuilderConfig" in reason:
            raise ValueError(
                f"{text!r} has several configurations, got {config!r}: write '{text}:CONFIG' ({reason})"
            ) from error
        raise


def _one_split(source: datasets.Dataset | datasets.DatasetDict, name: str, split: str) -> datasets.Dataset:
    if isinstance(source, dict):
        if split not in source:
            _unknown_split(name, split, list(source))
        return source[split]
    if split not in ("train", str(source.split)):
        # Handing out the only split for "test" would evaluate on training images without a word.
        raise ValueError(
            f"{name} is a single Dataset, which has no split {split!r}: leave split out to take it as it is, or use a "
            "DatasetDict with named splits"
        )
    return source


def _unknown_split(name: str, split: str, available: Sequence[str], error: Exception | None = None) -> NoReturn:
    if len(available) == 1:
        way_out = f"it has only one split, write split={available[0]!r}"
    else:
        way_out = f"available splits: {', '.join(available)}"
    raise ValueError(f"{name!r} has no split {split!r}: {way_out}") from error


def _unknown_source(name: str, reason: str, error: Exception | None = None) -> NoReturn:
    import datasets

    hint = ""
    if datasets.config.HF_HUB_OFFLINE:
        hint = "; offline mode is on, so only folders and cached data sets are found: unset HF_HUB_OFFLINE and "
        hint += "HF_DATASETS_OFFLINE to reach the Hub"
    if difflib.get_close_matches(name.lower(), ["digits"]):
        hint += "; did you mean 'digits'?"
    raise FileNotFoundError(
        f"{name!r} is not a folder on this machine (looked for {os.path.abspath(name)}) and was not found on the Hub "
        f"({reason}): pass an existing folder, a Hub id like 'owner/name', or 'digits', which needs no download{hint}"
    ) from error


# Columns and labels -------------------------------------------------------------------------------------------------


def _find_image_column(features: Mapping[str, Any], requested: str | None, name: str) -> str:
    import datasets

    if requested is not None:
        kind = features[_existing(requested, features, "image_column", name)]
        if not (isinstance(kind, datasets.Image) or _is_struct(kind) or _dtype(kind) in ("string", "binary")):
            raise ValueError(
                f"image_column {requested!r} of {name!r} has type {kind}, images must be of type Image, encoded bytes "
                f"or file paths: cast it with dataset.cast_column({requested!r}, datasets.Image())"
            )
        return requested
    found = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    found = found or [column for column, kind in features.items() if _is_struct(kind)]
    if not found:
        columns = ", ".join(f"{column} ({kind})" for column, kind in features.items())
        raise ValueError(
            f"{name!r} has no image column, its columns are {columns}: name the column that holds encoded images or "
            "file paths with image_column=..."
        )
    return _the_one(found, ("image", "img", "images"), "image_column", name)


def _find_label_column(features: Mapping[str, Any], requested: str | None, name: str) -> str | None:
    import datasets

    if requested is not None:
        if requested == "none" and requested not in features:
            return None
        return _existing(requested, features, "label_column", name)
    found = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    usual = [column for column in ("label", "labels") if column in features]
    plain = [column for column in usual if _dtype(features[column]).startswith(("int", "uint", "string"))]
    if not found and not plain:
        return None
    return _the_one(found or plain, ("label", "labels"), "label_column", name)


def _dtype(kind: Any) -> str:
    """Storage type of a plain column without the size prefix of arrow's large variants; "" for a nested one."""
    return str(getattr(kind, "dtype", "")).removeprefix("large_").removesuffix("_view")


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, Mapping) and set(kind) == {"bytes", "path"}


def _existing(requested: str, features: Mapping[str, Any], argument: str, name: str) -> str:
    if requested in features:
        return requested
    close = difflib.get_close_matches(requested, list(features), n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "name one of these"
    raise ValueError(f"{name!r} has no {argument} {requested!r}, its columns are {', '.join(features)}: {hint}")


def _the_one(found: Sequence[str], preferred: Sequence[str], argument: str, name: str) -> str:
    for column in found if len(found) == 1 else preferred:
        if column in found:
            return column
    without = ', or label_column="none" to load no labels' if argument == "label_column" else ""
    raise ValueError(
        f"{name!r} has {len(found)} columns that could be the {argument}: {', '.join(found)}: choose one with "
        f"{argument}={found[0]!r}{without}"
    )


def _read_labels(
    table: datasets.Dataset, column: str | None, name: str
) -> tuple[Tensor | None, tuple[str, ...] | None, int | None]:
    """Labels int64 (N,) or None, their names where known, and the number of classes."""
    if column is None:
        return None, None, None
    import pyarrow as pa

    kind = table.features[column]
    values = table.select_columns([column]).with_format("arrow")[:].column(column)
    names = getattr(kind, "names", None)
    if names is None and _dtype(kind) == "string":
        texts = [text or None for text in values.to_pylist()]
        names = sorted({text for text in texts if text is not None})
        number = {text: index for index, text in enumerate(names)}
        labels = np.array([-1 if text is None else number[text] for text in texts], dtype=np.int64)
    elif names is not None or _dtype(kind).startswith(("int", "uint", "bool")):
        labels = np.array(values.cast(pa.int64()).fill_null(-1).to_numpy(), dtype=np.int64)
    else:
        raise ValueError(
            f"label_column {column!r} of {name!r} has type {kind}, labels must be ClassLabel, integers or strings, "
            'one per image: cast the column, name another one, or write label_column="none"'
        )
    missing = np.flatnonzero(labels < 0)
    if len(missing) == len(labels):
        logger.info("%s: every label in column %r is missing, the set counts as unlabelled", name, column)
        return None, None, None
    if len(missing):
        raise ValueError(
            f"{len(missing)} of {len(labels)} labels in column {column!r} of {name!r} are missing (null, negative or "
            f"empty; the first in row {missing[0]}), a set is labelled wholly or not at all: drop these rows with "
            'datasets.Dataset.filter, or write label_column="none"'
        )
    limit = len(names) if names is not None else _MOST_CLASSES
    if labels.max() >= limit:
        raise ValueError(
            f"column {column!r} of {name!r} holds the label {labels.max()}, class numbers must be below {limit}: "
            "number the classes from 0 (an identifier is no label)"
        )
    num_classes = len(names) if names is not None else int(labels.max()) + 1
    return torch.from_numpy(labels), None if names is None else tuple(names), num_classes


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


# Decoding -----------------------------------------------------------------------------------------------------------


class _EncodedImages:
    """The undecoded images of one column, and the rows of the source they come from."""

    def __init__(self, table: datasets.Dataset, column: str, rows: np.ndarray, name: str) -> None:
        self.table, self.column, self.rows, self.name = table, column, rows, name

    @classmethod
    def from_table(cls, table: datasets.Dataset, column: str, name: str) -> _EncodedImages:
        import datasets

        plain = table.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=False))
        return cls(plain, column, np.arange(len(table)), name)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, positions: Sequence[int]) -> _EncodedImages:
        return _EncodedImages(self.table.select(positions), self.column, self.rows[list(positions)], self.name)

    def fetch(self, positions: range) -> list[Any]:
        return self.table[positions.start : positions.stop][self.column]

    def decode(self, position: int, size: tuple[int, int]) -> np.ndarray:
        record = self.table[position][self.column]
        try:
            return _decode(record, size)
        except Exception as error:
            raise ValueError(self.describe(position, record, error)) from error

    def describe(self, position: int, record: Any, error: Exception) -> str:
        path = (record or {}).get("path")
        known = "" if not path else f" (file {path})"
        reason = "not an image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        return (
            f"row {self.rows[position]} of {self.name!r}{known} cannot be read as an image, {reason}: repair or "
            'remove it, or drop such images with on_error="skip"'
        )


@contextlib.contextmanager
def _opened(record: Mapping[str, Any] | None) -> Iterator[Image.Image]:
    content = None if record is None else record.get("bytes")
    if record is not None and content is None and record.get("path"):
        content = Path(record["path"]).read_bytes()
    if content is None:
        raise ValueError("the row holds no image")
    with Image.open(io.BytesIO(content)) as image:
        yield image


def _decode(record: Mapping[str, Any] | None, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) of exactly `size`."""
    with _opened(record) as image:
        upright = ImageOps.exif_transpose(image) if image.getexif().get(_EXIF_ORIENTATION, 1) != 1 else image
        rgb = _to_rgb(upright)
    height, width = size
    if rgb.size != (width, height):
        scale = max(width / rgb.width, height / rgb.height)
        larger = (max(width, round(rgb.width * scale)), max(height, round(rgb.height * scale)))
        rgb = rgb.resize(larger, Image.Resampling.BICUBIC)
        left, top = (larger[0] - width) // 2, (larger[1] - height) // 2
        rgb = rgb.crop((left, top, left + width, top + height))
    return np.asarray(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 instead of scaling. "I" is how older versions open 16-bit PNG files.
        values, top = np.asarray(image), 1.0 if image.mode == "F" else 65535.0
        if not (values.min() >= 0 and values.max() <= top):  # also refuses NaN
            raise ValueError(f"values {values.min()}..{values.max()} in mode {image.mode} exceed 0..{top:g}")
        return Image.fromarray((values.astype(np.float64) * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _in_threads(work: Callable[[range], _T], encoded: _EncodedImages, description: str) -> list[_T]:
    """Results of `work` over consecutive ranges of positions; the first error in that order ends it."""
    count = len(encoded)
    first = encoded.fetch(range(1))[0]
    # Below some kilobytes Python costs more than decoding, and threads only take turns at the interpreter.
    small = first is not None and first.get("bytes") is not None and len(first["bytes"]) < 8192
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    pool = ThreadPoolExecutor(1 if small else min(16, os.cpu_count() or 1))
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    results = []
    try:
        with tqdm(total=count, desc=description, unit=" images", delay=3, disable=quiet) as bar:
            for chunk, result in zip(chunks, pool.map(work, chunks), strict=True):
                results.append(result)
                bar.update(len(chunk))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return results


def _common_size(encoded: _EncodedImages) -> tuple[int, int]:
    """(H, W) that all images share by their headers, else a square of the median shorter side, at most 256."""

    def measure(positions: range) -> list[tuple[int, int]]:
        sizes = []
        for record in encoded.fetch(positions):
            # Unreadable images have no say here; decoding meets them again and reports them.
            with contextlib.suppress(Exception), _opened(record) as image:
                turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
                sizes.append(image.size if turned else (image.height, image.width))
        return sizes

    sizes = [size for part in _in_threads(measure, encoded, f"{encoded.name}: sizes") for size in part]
    if len(set(sizes)) <= 1:
        return sizes[0] if sizes else (1, 1)
    shorter = sorted(min(size) for size in sizes)
    side = min(_LARGEST_AUTOMATIC_SIZE, int(statistics.median(shorter)))
    logger.info(
        "%s: shorter sides of %d to %d pixels; every image is resized to a shorter side of %d (the median, at most "
        "%d) and cropped in the centre, image_size=... chooses another size",
        *(encoded.name, shorter[0], shorter[-1], side, _LARGEST_AUTOMATIC_SIZE),
    )
    return side, side


def _allocate(encoded: _EncodedImages, size: tuple[int, int], memory_budget: int) -> Tensor | None:
    needed = len(encoded) * 3 * size[0] * size[1]
    if needed <= memory_budget:
        return torch.empty((len(encoded), 3, *size), dtype=torch.uint8)
    logger.info(
        "%s is streamed: %d images of 3 x %d x %d take %.2f GiB, memory_budget is %.2f GiB; they are checked now and "
        "decoded again at every access (use DataLoader workers, a smaller image_size or a larger memory_budget)",
        *(encoded.name, len(encoded), *size, needed / 2**30, memory_budget / 2**30),
    )
    return None


def _decode_all(encoded: _EncodedImages, size: tuple[int, int], images: Tensor | None, on_error: str) -> list[int]:
    """Decode every image, into `images` if given; the positions that could be read."""
    target = None if images is None else images.numpy()

    def decode(positions: range) -> list[int]:
        unreadable = []
        for position, record in zip(positions, encoded.fetch(positions), strict=True):
            try:
                pixels = _decode(record, size)
            except Exception as error:  # Pillow's readers raise nearly every type on broken files
                if on_error == "raise":
                    raise ValueError(encoded.describe(position, record, error)) from error
                unreadable.append(position)
                continue
            if target is not None:
                target[position] = pixels.transpose(2, 0, 1)
        return unreadable

    description = f"{encoded.name}: {'checking' if images is None else 'decoding'}"
    unreadable = [position for part in _in_threads(decode, encoded, description) for position in part]
    if not unreadable:
        return list(range(len(encoded)))
    if len(unreadable) == len(encoded):
        raise ValueError(
            f"none of the {len(encoded)} images of {encoded.name!r} can be read as an image: check image_column, here "
            f"{encoded.column!r}"
        )
    rows = ", ".join(str(encoded.rows[position]) for position in unreadable[:20])
    more = ", ..." if len(unreadable) > 20 else ""
    logger.warning(
        "%s: skipped %d of %d images that cannot be read, rows %s%s",
        *(encoded.name, len(unreadable), len(encoded), rows, more),
    )
    dropped = set(unreadable)
    return [position for position in range(len(encoded)) if position not in dropped]
