"""A coreset that an earlier run has chosen, read from its file."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_robust.data import ImageDataset
from hf_robust.objectives.base import Objective

from .base import Coreset, CoresetMethod, Selection, SelectionTask

__all__ = ["StoredCoreset"]

logger = logging.getLogger(__name__)


@dataclass
class StoredCoreset(CoresetMethod):
    """Train on the images named in a `coreset-NNNN.json`; nothing is chosen any more.

    Args:
        path (`str`): the file; `--coreset file:coreset.json` on the command line.
        warmup_epochs (`float`, defaults to 0): epochs on all images first.

    Raises:
        ValueError: if the file is no coreset.
    """

    path: str
    warmup_epochs: float = field(default=0.0, metadata={"help": "Epochs on all images before the coreset is used."})

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_epochs < float("inf"):
            raise ValueError(f"coreset warmup_epochs must be 0 or more, got {self.warmup_epochs}")
        self._stored = Coreset.load(self.path)
        self.interval, self.validation_fraction = 1, 0.0
        self.fraction = len(self._stored.indices) / self._stored.dataset_size

    @property
    def chooses(self) -> bool:
        """Whether the file leaves anything out."""
        return len(self._stored.indices) < self._stored.dataset_size

    @property
    def provenance(self) -> str:
        """The method that chose the images."""
        return self._stored.method

    def budget(self, pool: int, batch_size: int) -> int:
        """Images of the file."""
        return len(self._stored.indices)

    def due(self, epoch: int) -> bool:
        """Once."""
        return epoch == 0

    def check(self, objective: Objective, model: Any, dataset: ImageDataset) -> None:
        """Refuse a file that belongs to a data set of another size."""
        if self._stored.dataset_size != len(dataset):
            raise ValueError(
                f"{self.path!r} was chosen from {self._stored.dataset_size} images of {self._stored.dataset!r}, and "
                f"the training set has {len(dataset)}: train on the set (and --max_examples) it was chosen from"
            )
        if self._stored.dataset != dataset.name:
            logger.warning(
                "%s was chosen from %r, the training set is %r: the same positions mean the same images only if it is "
                "the same set under another name",
                *(self.path, self._stored.dataset, dataset.name),
            )

    def select(self, task: SelectionTask) -> Selection:
        """Return the stored images."""
        return Selection(torch.tensor(self._stored.indices))
