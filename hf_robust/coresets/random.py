"""Random subsets: the baselines that a selection has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .base import ChosenCoreset, Selection, SelectionTask, on_cpu

__all__ = ["RandomCoreset"]


@dataclass
class RandomCoreset(ChosenCoreset):
    """Images drawn uniformly without replacement.

    `refresh=False` is the published baseline: one subset, drawn once, for all epochs after the warm-up.
    `refresh=True` draws anew whenever a selection is due: after s selections it has shown the network up to s times
    as many images as the fixed subset, which is the fair control for a method that re-selects.

    Source: first public revision of the released RCS code, `coreset_util.py` (fixed subset); the refreshed one is
        ours.
    """

    refresh: bool = field(default=True, metadata={"help": "Draw anew at every selection; published: false."})

    def due(self, epoch: int) -> bool:
        """The fixed subset is drawn once."""
        return super().due(epoch) if self.refresh else epoch == 0

    def select(self, task: SelectionTask) -> Selection:
        """Draw `task.budget` images of the pool."""
        drawn = on_cpu(task.generator("random subset")) if self.refresh else torch.Generator().manual_seed(task.seed)
        order = torch.randperm(len(task.pool), generator=drawn)
        return Selection(task.pool[order[: task.budget]])
