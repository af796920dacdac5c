"""From encoded images of any mode and size to uint8 pixels of one size."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_LARGEST_AUTOMATIC_SIZE = 256
_CHUNK = 128
_SAMPLED_SIZES = 4096  # headers that tell the size of a set whose images are not all looked at
_EXIF_ORIENTATION = 0x0112
_T = TypeVar("_T")


class EncodedImages:
    """The undecoded images of one column, and the rows of the source they come from.

    The table stays where it is, in files that are mapped into memory: reading a record reads a few kilobytes of them.
    """

    def __init__(self, table: datasets.Dataset, column: str, rows: np.ndarray, name: str) -> None:
        self.table, self.column, self.rows, self.name = table, column, rows, name
        self._unreadable: set[int] = set()

    @classmethod
    def from_table(cls, table: datasets.Dataset, column: str, name: str) -> EncodedImages:
        """Take one column of a table, of type `Image`, bytes, paths or `{"bytes", "path"}`, without decoding it."""
        import datasets

        plain = table.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=False))
        return cls(plain, column, np.arange(len(table)), name)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, positions: Sequence[int]) -> EncodedImages:
        """Return the images at `positions`, in that order."""
        return EncodedImages(self.table.select(positions), self.column, self.rows[list(positions)], self.name)

    def fetch(self, positions: range) -> list[Any]:
        """Return the stored records `{"bytes", "path"}` at `positions`; `None` for a null row."""
        return self.table[positions.start : positions.stop][self.column]

    def decode(self, position: int, size: tuple[int, int]) -> np.ndarray:
        """Return one image, uint8 (H, W, 3) of `size`; `ValueError` names its row when it cannot be read."""
        record = self.table[position][self.column]
        try:
            return _decode(record, size)
        except Exception as error:
            raise ValueError(self.describe(position, record, error)) from error

    def decode_or_next(self, position: int, size: tuple[int, int]) -> tuple[int, np.ndarray]:
        """Return one image as `decode` does, or the next one that can be read (logged), and its position.

        Of images that nobody has looked at beforehand: a batch keeps its size, on every process.
        """
        for there in (*range(position, len(self)), *range(position)):
            if there in self._unreadable:
                continue
            try:
                return there, self.decode(there, size)
            except ValueError as error:
                self._unreadable.add(there)
                logger.warning("%s; here the next image takes its place", str(error).partition(": repair")[0])
        raise ValueError(f"none of the {len(self)} images of {self.name!r} can be read as an image")

    def describe(self, position: int, record: Any, error: Exception) -> str:
        """Say which image cannot be read, why, and what to do."""
        path = (record or {}).get("path")
        known = "" if not path else f" (file {path})"
        reason = "not an image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        return (
            f"row {self.rows[position]} of {self.name!r}{known} cannot be read as an image, {reason}: repair or "
            'remove it, or leave such images out with on_error="skip"'
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


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Copy pixels (H, W, 3) into a tensor (3, H, W)."""
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _in_threads(work: Callable[[range], _T], encoded: EncodedImages, description: str) -> list[_T]:
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


def common_size(encoded: EncodedImages, sampled: bool = False) -> tuple[int, int]:
    """(H, W) that all images share by their headers, else a square of the median shorter side, at most 256.

    With `sampled`, some thousand images, evenly spread, speak for all.
    """
    if sampled and len(encoded) > _SAMPLED_SIZES:
        encoded = encoded.select(np.linspace(0, len(encoded) - 1, _SAMPLED_SIZES, dtype=np.int64).tolist())

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


def allocate(encoded: EncodedImages, size: tuple[int, int], memory_budget: int) -> Tensor | None:
    """Return an empty uint8 (N, 3, H, W) tensor, or `None` (logged) when it would pass `memory_budget` bytes."""
    needed = len(encoded) * 3 * size[0] * size[1]
    if needed <= memory_budget:
        return torch.empty((len(encoded), 3, *size), dtype=torch.uint8)
    logger.info(
        "%s is streamed: %d images of 3 x %d x %d take %.2f GiB, memory_budget is %.2f GiB; they are decoded at every "
        "access (use DataLoader workers, a smaller image_size or a larger memory_budget)",
        *(encoded.name, len(encoded), *size, needed / 2**30, memory_budget / 2**30),
    )
    return None


def decode_all(encoded: EncodedImages, size: tuple[int, int], images: Tensor | None, on_error: str) -> list[int]:
    """Decode every image, into `images` if given; the positions that could be read."""
    target = None if images is None else images.numpy()

    def decode(positions: range) -> list[int]:
        """Decode one stretch; the positions in it that cannot be read."""
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
