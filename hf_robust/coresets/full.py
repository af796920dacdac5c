"""Full data: every epoch trains on every image."""

from __future__ import annotations

from dataclasses import dataclass

from .base import CoresetMethod, Selection, SelectionTask

__all__ = ["FullData"]


@dataclass
class FullData(CoresetMethod):
    """No coreset: the trivial method, and the yardstick of the others."""

    @property
    def chooses(self) -> bool:
        """Never leaves an image out."""
        return False

    def __post_init__(self) -> None:
        self.fraction, self.warmup_epochs, self.interval, self.validation_fraction = 1.0, 0.0, 1, 0.0

    def due(self, epoch: int) -> bool:
        """Once."""
        return epoch == 0

    def select(self, task: SelectionTask) -> Selection:
        """Choose everything."""
        return Selection(task.pool)
