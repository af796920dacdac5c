"""The automatic learning rate of AutoLoRa: halved when the validation accuracy stops rising; plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["AutoLearningRate", "Decision"]


@dataclass(frozen=True)
class Decision:
    """What follows from the accuracy after one epoch.

    Args:
        is_best (`bool`): the accuracy is higher than all before: keep these weights.
        restore (`bool`): the rate fell: put the best weights so far back (those of this epoch when `is_best`).
        learning_rate (`float`): rate of the next epoch.
        reason (`str`): why the rate fell or stayed; empty after an epoch that is not looked back from.
    """

    is_best: bool
    restore: bool
    learning_rate: float
    reason: str


class AutoLearningRate:
    """Halves the learning rate when a stretch of epochs brought too few rises, or no new best accuracy.

    With milestones w_1 < w_2 < ... (and w_0 = 0), the rule looks back after epoch w_j + 1 and counts c, how many of
    the last w_j - w_(j-1) epochs had a higher accuracy than the epoch before them. The rate falls

    - when c < `rho` (w_j - w_(j-1)), or
    - when no epoch since the last look was the best so far (not at the first look).

    Each fall is the moment to put the best weights back; the optimiser keeps its momentum.

    Args:
        base_lr (`float`): rate of the first epochs; published: 0.1 on small images, 0.01 on 224 pixels.
        epochs (`Sequence[int]`): milestones w_1, w_2, ..., rising; published for full fine-tuning of 50 epochs:
            16, 24, 28, 36, 40, 42, 44, 46, 48; for linear modes every fourth. Empty: the rate stays.
        rho (`float`, defaults to 0.75, as published): share of epochs that must rise, in (0, 1].
        divisor (`float`, defaults to 2, as published): what the rate is divided by, more than 1.

    Attributes:
        learning_rate (`float`): rate of the next epoch.
        best_accuracy (`float`): highest accuracy so far; -1 before the first.
        best_epoch (`int`): the epoch it belongs to; 0 before the first.

    Raises:
        ValueError: for a rate that is not positive, milestones that do not rise, or `rho` or `divisor` out of range.

    Source: Xu et al. 2024 (AutoLoRa); released code `AutoLoRa/utils.py`. It is the rule by which AutoAttack's APGD
        halves its steps, with two differences of that code, which we follow: c must reach the share (APGD: exceed it),
        and a rate that fell at the last look may fall again.
    """

    def __init__(self, base_lr: float, epochs: Sequence[int], rho: float = 0.75, divisor: float = 2.0) -> None:
        epochs = tuple(epochs)
        if not 0 < base_lr < math.inf:
            raise ValueError(f"base_lr must be positive, got {base_lr}: the published value is 0.1")
        if any(e != int(e) or e < 1 for e in epochs) or list(epochs) != sorted(set(epochs)):
            raise ValueError(f"epochs must be rising whole numbers, 1 or more, got {list(epochs)}: write 4, 8, 12")
        if not 0 < rho <= 1:
            raise ValueError(f"rho must be in (0, 1], got {rho}: the published value is 0.75")
        if not 1 < divisor < math.inf:
            raise ValueError(f"divisor must be more than 1, got {divisor}: the published value is 2")
        self.base_lr, self.rho, self.divisor = float(base_lr), float(rho), float(divisor)
        self.epochs = tuple(int(e) for e in epochs)
        self.learning_rate = self.base_lr
        self.best_accuracy, self.best_epoch = -1.0, 0
        self._accuracies: list[float] = []

    def update(self, epoch: int, accuracy: float) -> Decision:
        """Take the accuracy after an epoch and decide.

        Args:
            epoch (`int`): the epoch just finished, counted from 1; each is reported once, in order.
            accuracy (`float`): robust accuracy on validation images, as share or in percent.

        Returns:
            [`Decision`]: whether the weights are the best, whether to go back to the best, and the rate.

        Raises:
            ValueError: for an epoch out of order or an accuracy that is negative or not a number.
        """
        if epoch != len(self._accuracies) + 1:
            raise ValueError(
                f"epoch {len(self._accuracies) + 1} comes next, got {epoch}: report every epoch once, in order, and "
                "load the state when you resume"
            )
        if not 0 <= accuracy < math.inf:
            raise ValueError(
                f"accuracy must be a number, 0 or more, got {accuracy}: report the share of right answers"
            )
        self._accuracies.append(float(accuracy))
        is_best = accuracy > self.best_accuracy
        if is_best:
            self.best_accuracy, self.best_epoch = float(accuracy), epoch
        if epoch - 1 not in self.epochs:
            return Decision(is_best, False, self.learning_rate, "")
        falls, reason = self._look_back(self.epochs.index(epoch - 1))
        if falls:
            self.learning_rate /= self.divisor
        return Decision(is_best, falls, self.learning_rate, reason)

    def _look_back(self, look: int) -> tuple[bool, str]:
        """Whether the rate falls, and why; `look` counts from 0."""
        start, end = (0, *self.epochs)[look], self.epochs[look]
        accuracies = self._accuracies[start : end + 1]  # those of epochs start + 1 to end + 1
        rises = sum(later > earlier for earlier, later in zip(accuracies, accuracies[1:], strict=False))
        counted = f"accuracy rose in {rises} of {end - start} epochs"
        if rises < self.rho * (end - start):
            return True, f"{counted}, fewer than {self.rho:.0%}"
        if look > 0 and self.best_epoch <= start + 1:  # epoch start + 1 was seen by the look before this one
            return True, f"{counted}, but the best is still that of epoch {self.best_epoch}"
        return False, counted

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain JSON.

        Returns:
            `dict[str, Any]`: settings, rate, best accuracy and epoch, accuracies so far.
        """
        return {
            "base_lr": self.base_lr,
            "epochs": list(self.epochs),
            "rho": self.rho,
            "divisor": self.divisor,
            "learning_rate": self.learning_rate,
            "best_accuracy": self.best_accuracy,
            "best_epoch": self.best_epoch,
            "accuracies": list(self._accuracies),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken.

        Args:
            state (`dict[str, Any]`): of `state_dict`.

        Raises:
            ValueError: if the state belongs to a rule with other settings.
        """
        mine = self.state_dict()
        for name in ("base_lr", "epochs", "rho", "divisor"):
            if state[name] != mine[name]:
                raise ValueError(
                    f"the saved learning rate has {name} {state[name]}, this one {mine[name]}: resume with the "
                    "settings of the run, or start anew in another folder"
                )
        self.learning_rate = float(state["learning_rate"])
        self.best_accuracy, self.best_epoch = float(state["best_accuracy"]), int(state["best_epoch"])
        self._accuracies = [float(a) for a in state["accuracies"]]
