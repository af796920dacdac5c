"""The part of the training images that decides during fine-tuning, so that test images need not."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from hf_robust.data import ImageDataset
from hf_robust.evaluation.probe import stratified_indices

__all__ = ["split_validation"]


def split_validation(dataset: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset | None]:
    """Hold a part of the training images out, of each class the same share and at least one image.

    Args:
        dataset ([`ImageDataset`]): labelled.
        fraction (`float`): share that is held out, in [0, 1).
        seed (`int`): of the choice.

    Returns:
        `tuple[ImageDataset, ImageDataset | None]`: images to train on, images to choose by; `None` for fraction 0.

    Raises:
        ValueError: if a class has no image left to train on, or there are no labels.
    """
    if not fraction:
        return dataset, None
    if dataset.labels is None:
        raise ValueError(
            f"fine-tuning is supervised and {dataset.name!r} has no labels: name the label column (--label_column); a "
            "folder of images needs one subfolder per class, at least two"
        )
    classes, counts = dataset.labels.unique(return_counts=True)
    held_out = stratified_indices(dataset.labels, max(len(classes), round(fraction * len(dataset))), seed)
    kept = torch.ones(len(dataset), dtype=torch.bool)
    kept[held_out] = False
    train, validation = dataset.subset(kept.nonzero().flatten()), dataset.subset(held_out)
    missing = sorted(set(classes.tolist()) - set(cast(Tensor, train.labels).tolist()))
    if missing:
        raise ValueError(
            f"holding out {fraction:g} of {dataset.name!r} leaves no image of the classes {missing[:5]} to train on "
            f"(the rarest class has {int(counts.min())}): add images of them, lower --validation_fraction, or write 0 "
            "with --keep last"
        )
    return train, validation
