"""Which images each round shows: slices of full passes during warm-up, then the coreset."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_robust.data import epoch_order

__all__ = ["CoresetSampler", "Rounds"]


@dataclass(frozen=True)
class Rounds:
    """How rounds of constant length stand for epochs of the published schedules.

    A trainer counts the steps of an epoch once, so every round has as many images as a coreset. The warm-up is as
    many rounds as its full passes fill; afterwards one round is one epoch on the coreset, which the published
    schedules count like an epoch on everything.

    Args:
        pool (`int`): images of a full pass.
        length (`int`): images of a round.
        warmup_epochs (`float`): full passes before the first coreset.
    """

    pool: int
    length: int
    warmup_epochs: float

    @property
    def warmup(self) -> int:
        """Rounds of the warm-up; the last one may run a little into the next pass."""
        return math.ceil(self.warmup_epochs * self.pool / self.length - 1e-9)

    def epoch(self, rounds: float) -> float:
        """Training epoch after a number of rounds.

        Args:
            rounds (`float`): 0 or more.
        """
        if rounds < self.warmup:
            return self.warmup_epochs * rounds / self.warmup
        return self.warmup_epochs + rounds - self.warmup

    def rounds(self, epochs: float) -> float:
        """Rounds that take a number of epochs; the inverse of `epoch`.

        Args:
            epochs (`float`): 0 or more.
        """
        if epochs < self.warmup_epochs:
            return self.warmup * epochs / self.warmup_epochs
        return self.warmup + epochs - self.warmup_epochs


class CoresetSampler(torch.utils.data.Sampler[int]):
    """Shuffled positions in the training set, of constant length; a function of (seed, round, coreset) alone.

    Rounds of the warm-up are consecutive slices of an endless row of full permutations of the pool, so that every
    full pass shows every image once. It neither reads nor moves a global random state.

    Args:
        pool (`torch.Tensor` of shape `(n,)`): positions of the images that may be trained on.
        rounds ([`Rounds`]): length and number of warm-up rounds.
        seed (`int`): non-negative.
    """

    def __init__(self, pool: Tensor, rounds: Rounds, seed: int = 0) -> None:
        self.pool, self.rounds, self.seed = pool, rounds, seed
        self.epoch = 0  # the name that the stock trainer and Accelerate set
        self.indices: Tensor | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the round (from 0) that the next iteration yields."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.rounds.length

    def __iter__(self) -> Iterator[int]:
        if self.epoch < self.rounds.warmup:
            return iter(self._slice().tolist())
        if self.indices is None:
            raise RuntimeError(f"round {self.epoch} needs a coreset and none is set: call start_epoch first")
        order = epoch_order(len(self.indices), self.seed, self.epoch)
        return iter(self.indices[order].tolist())

    def _slice(self) -> Tensor:
        n, start = len(self.pool), self.epoch * len(self)
        passes = range(start // n, (start + len(self) - 1) // n + 1)
        row = torch.cat([self.pool[epoch_order(n, self.seed, k)] for k in passes])
        return row[start - passes[0] * n :][: len(self)]
