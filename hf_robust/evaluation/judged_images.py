"""The images an evaluation judges: any source as pixels in [0, 1] with labels, checked, and a fair part of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..data import ImageDataset, collate_images
from ..views import Views
from .probe import stratified_indices

__all__ = ["JudgedImages"]


@dataclass(frozen=True)
class JudgedImages:
    """Labelled images that come as float pixels in [0, 1], batch by batch.

    Args:
        source ([`ImageDataset`] or `torch.Tensor`): stored images, or float pixels `(N, C, H, W)`.
        labels (`torch.Tensor` of shape `(N,)`): int64.
        indices (`torch.Tensor` of shape `(N,)`): where these images stand in the set that was given.
        n_total (`int`): length of that set.
        name (`str`): of the set.
        label_names (`tuple[str, ...]`, *optional*): names of the classes.
    """

    source: Any
    labels: Tensor
    indices: Tensor
    n_total: int
    name: str
    label_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, dataset: ImageDataset | Sequence[Tensor], n: int | None = None, seed: int = 0) -> JudgedImages:
        """Check a data set and take `n` of its images, of each class its share.

        Args:
            dataset ([`ImageDataset`] or pair of tensors): images uint8, or float in [0, 1], `(N, C, H, W)`, and labels
                `(N,)`.
            n (`int`, *optional*): default: all.
            seed (`int`, defaults to 0): of the choice.

        Raises:
            ValueError: for anything else, pixels outside [0, 1], no labels, or fewer images than classes.
        """
        name, names = "tensors", None
        source: Any = dataset
        if isinstance(dataset, tuple | list) and len(dataset) == 2 and isinstance(dataset[0], Tensor):
            source, labels = _checked(dataset[0], torch.as_tensor(dataset[1]))
        elif isinstance(dataset, ImageDataset):
            if dataset.labels is None:
                raise ValueError(
                    f"an accuracy needs labels, {dataset.name!r} has none: name its label column (label_column=...), "
                    "or measure its encoder by embedding_robustness"
                )
            labels, name = dataset.labels.cpu(), dataset.name
            names = tuple(map(str, dataset.label_names)) if dataset.label_names else None
        else:
            raise ValueError(
                f"dataset must be one of load_image_dataset or a pair (images, labels) of tensors, got "
                f"{type(dataset).__name__}: hf_robust.load_image_dataset reads Hub ids, folders and Dataset objects "
                "(a loader that normalises would make every budget meaningless)"
            )
        whole = torch.arange(len(labels))
        chosen = whole if n is None or n >= len(labels) else stratified_indices(labels, n, seed)
        if len(chosen) < len(labels):
            source = source[chosen] if isinstance(source, Tensor) else source.subset(chosen)
        return cls(source, labels[chosen].long(), chosen, len(labels), name, names)

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: Tensor) -> JudgedImages:
        """Some of the images, in the order of `rows`."""
        source = self.source[rows] if isinstance(self.source, Tensor) else self.source.subset(rows)
        return JudgedImages(source, self.labels[rows], self.indices[rows], self.n_total, self.name, self.label_names)

    def numbered_as(self, names: Sequence[str]) -> JudgedImages:
        """The same images with the numbers that their classes have in `names`.

        Args:
            names (`Sequence[str]`): with every one of `label_names`.
        """
        numbers = torch.tensor([names.index(name) for name in self.label_names or ()])
        labels = numbers[self.labels]
        stored = isinstance(self.source, ImageDataset)
        source = self.source.relabelled(labels, names) if stored else self.source
        return replace(self, source=source, labels=labels, label_names=tuple(names))

    def stored(self) -> ImageDataset:
        """The images as a data set of 8 bits per colour, grey ones as RGB."""
        if isinstance(self.source, ImageDataset):
            return self.source
        levels = (self.source * 255).round().to(torch.uint8)
        levels = levels if levels.shape[1] == 3 else levels[:, :1].repeat(1, 3, 1, 1)
        return ImageDataset.from_tensors(levels, self.labels, self.label_names, name=self.name)

    @property
    def image_size(self) -> tuple[int, int]:
        """`(H, W)` of the images as they are stored."""
        height, width = self.source.shape[-2:] if isinstance(self.source, Tensor) else self.source.image_size
        return int(height), int(width)

    @property
    def channels(self) -> int:
        """Colours of an image: 1 for grey ones in a tensor."""
        return int(self.source.shape[1]) if isinstance(self.source, Tensor) else 3

    def pixels(self, rows: range, size: int | None, device: torch.device | str = "cpu") -> Tensor:
        """A batch of images.

        Args:
            rows (`range`): positions among these images.
            size (`int`, *optional*): side in pixels they are brought to, bicubic; default: as they are.
            device (`torch.device` or `str`): where they go.

        Returns:
            `torch.Tensor` of shape `(len(rows), C, size, size)`: float32 in [0, 1], contiguous.
        """
        if isinstance(self.source, Tensor):
            x = self.source[rows.start : rows.stop].to(device)
            if size is not None and x.shape[-2:] != (size, size):
                x = interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
            return x.contiguous()
        batch = collate_images([self.source[k] for k in rows])["image"].to(device)
        if size is None or batch.shape[-2:] == (size, size):
            return (batch.float() / 255).contiguous()
        generator = torch.Generator(batch.device).manual_seed(0)  # the view "original" draws nothing
        return Views(size=size)(batch, ["original"], generator=generator)["original"].contiguous()

    def fingerprint(self) -> str:
        """A short hash of which images these are; of large sets some 64 of them stand for all pixels.

        Returns:
            `str`: 16 hexadecimal digits.
        """
        digest = hashlib.sha256(repr((self.name, self.image_size, self.n_total)).encode())
        for tensor in (self.indices, self.labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        for row in {*range(0, len(self), -(-len(self) // 64)), len(self) - 1}:
            digest.update(self.pixels(range(row, row + 1), None).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def _checked(images: Tensor, labels: Tensor) -> tuple[Any, Tensor]:
    if images.dim() != 4 or not len(images) or labels.shape != (len(images),):
        raise ValueError(
            f"images must be (N, C, H, W) and labels (N,), got {tuple(images.shape)} and {tuple(labels.shape)}: one "
            "label per image"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool or int(labels.min()) < 0:
        raise ValueError(
            f"labels must be whole numbers from 0, got {labels.dtype} from {labels.min()}: number the classes from 0"
        )
    if images.dtype == torch.uint8:
        images = images.float() / 255
    low, high = (float(images.min()), float(images.max())) if images.is_floating_point() else (-1.0, 256.0)
    if not (0 <= low and high <= 1):  # also for NaN
        raise ValueError(
            f"images must be pixels in [0, 1] (or uint8), got {images.dtype} from {low:.3g} to {high:.3g}: an attack "
            "clips to [0, 1] and counts its budget in pixels, so put Normalize inside the model and leave it out of "
            "the data (divide by 255 for values up to 255)"
        )
    return images.float().cpu(), labels.long().cpu()
