"""The loop back from the network to the images: warm-up, selections, and what of them survives a kill."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_robust.data import ImageDataset

from .base import Coreset, CoresetMethod, SelectionTask
from .sampler import CoresetSampler, Rounds

__all__ = ["CoresetPhases", "seeded_generator"]

_FILE = "coreset.json"


def seeded_generator(device: torch.device, *names: Any) -> torch.Generator:
    """A generator whose numbers depend on the names and on nothing else.

    Args:
        device (`torch.device`): of the generator.
        names (`Any`): seed, purpose, counters; hashed, so that (1, 0) is not (0, 1).
    """
    name = "/".join(str(n) for n in names).encode()
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest())
    return torch.Generator(device).manual_seed(seed)


class CoresetPhases:
    """Sampler, schedule and present coreset of one training run.

    Args:
        method ([`CoresetMethod`]): chooses.
        dataset ([`ImageDataset`]): the training set.
        batch_size (`int`): images of a training step over all processes.
        seed (`int`): of the data order.
        epochs (`float`): length of the training in epochs; 0: not known.
        whole_batches (`bool`): rounds hold a whole number of batches, as they must where the last, short batch is
            dropped: the coreset is then rounded to batches, so that all of it is trained on.

    Raises:
        ValueError: if the validation split leaves nothing to train on or is empty although the method wants one, a
            coreset is smaller than a batch, or the warm-up takes the whole training.
    """

    def __init__(
        self,
        method: CoresetMethod,
        dataset: ImageDataset,
        batch_size: int,
        seed: int,
        epochs: float,
        whole_batches: bool = False,
    ) -> None:
        self.method, self.dataset, self.batch_size, self.seed = method, dataset, batch_size, seed
        self.pool, self.validation = method.split(len(dataset), seed)
        self._check_split()
        length = method.budget(len(self.pool), batch_size)
        if length < batch_size:
            raise ValueError(
                f"a coreset of {method.fraction:.3g} of {len(self.pool)} images has {length}, fewer than the batch of "
                f"{batch_size}: raise --coreset_fraction or lower --per_device_train_batch_size"
            )
        if method.chooses and 0 < epochs <= method.warmup_epochs:
            raise ValueError(
                f"the coreset warm-up of {method.warmup_epochs:g} epochs takes the whole training of {epochs:g}: "
                "lower --coreset_warmup_epochs, or raise --num_train_epochs"
            )
        if whole_batches and method.chooses:
            length = min(max(1, round(length / batch_size)), len(self.pool) // batch_size) * batch_size
        self.rounds = Rounds(len(self.pool), length, method.warmup_epochs)
        self.sampler = CoresetSampler(self.pool, self.rounds, seed)
        self.current: Coreset | None = None

    def _check_split(self) -> None:
        wanted, images = self.method.validation_fraction, len(self.dataset)
        if len(self.pool) < 2 or (wanted and not len(self.validation)):
            raise ValueError(
                f"coreset validation_fraction {wanted:g} of {images} images leaves {len(self.pool)} to train on and "
                f"{len(self.validation)} to validate on: give a value between {1 / images:.2g} and "
                f"{1 - 2 / images:.2g}, published is 0.01"
            )

    def steps(self, epochs: float, max_steps: int, steps_per_round: int) -> int:
        """Optimiser steps of a whole training.

        Args:
            epochs (`float`): its length as asked for.
            max_steps (`int`): the same in steps; goes first when positive.
            steps_per_round (`int`): optimiser steps of a round.

        Returns:
            `int`: -1 for full data without `max_steps`, where the stock trainer counts epochs itself.

        Raises:
            ValueError: if the training ends before the first coreset.
        """
        if not self.method.chooses or max_steps > 0:
            if self.method.chooses and max_steps <= self.rounds.warmup * steps_per_round:
                raise ValueError(
                    f"the coreset warm-up of {self.method.warmup_epochs:g} epochs takes the whole training of "
                    f"{max_steps} steps: lower --coreset_warmup_epochs, or raise --max_steps"
                )
            return max_steps
        return math.ceil(self.rounds.rounds(epochs) * steps_per_round - 1e-9)

    def close(self, rounds: float) -> tuple[float, float, bool]:
        """What the end of a round means in epochs.

        Args:
            rounds (`float`): rounds trained so far; the last one may be unfinished.

        Returns:
            `tuple[float, float, bool]`: epoch at the beginning of the round and now, and whether a checkpoint per
            epoch is due: in the warm-up, whose rounds are shorter, at the end of an epoch, afterwards of an interval.
        """
        number = max(0, math.ceil(rounds - 1e-6) - 1)
        before, now = self.rounds.epoch(number), self.rounds.epoch(rounds)
        since = number + 1 - self.rounds.warmup
        ended = math.floor(now + 1e-6) > math.floor(before + 1e-6)
        return before, now, ended and (since <= 0 or since % self.method.interval == 0)

    def due(self, round: int) -> bool:
        """Whether a selection has to be made before a round; not again after a resume in the middle of one."""
        since = round - self.rounds.warmup
        if since < 0 or (self.current is not None and self.current.round == round):
            return False
        return self.current is None or self.method.due(since)

    def task(self, round: int, *, device: torch.device, **given: Any) -> SelectionTask:
        """Put together what the method needs to choose the coreset of a round.

        Args:
            round (`int`): the coreset is used from this round on.
            device (`torch.device`): where the model is.
            given (`Any`): the fields of [`SelectionTask`] that only the trainer knows.

        Returns:
            [`SelectionTask`]: with generators seeded by (seed, round, purpose).
        """
        return SelectionTask(
            dataset=self.dataset,
            pool=self.pool,
            validation=self.validation,
            budget=self.rounds.length,
            batch_size=self.batch_size,
            seed=self.seed,
            generator=lambda purpose: seeded_generator(device, self.seed, "coreset", round, purpose),
            device=device,
            **given,
        )

    def select(self, round: int, task: SelectionTask) -> dict[str, float]:
        """Choose the coreset of a round.

        Args:
            round (`int`): it is used from this round on.
            task ([`SelectionTask`]): what the method works with.

        Returns:
            `dict[str, float]`: what to log: size, seconds, overlap with the coreset before; empty for full data.

        Raises:
            RuntimeError: if the method returned something else than `budget` distinct images of the pool.
        """
        started = time.monotonic()
        selection = self.method.select(task)
        seconds = time.monotonic() - started
        self._check(selection.indices)
        previous, epoch = self.current, self.rounds.epoch(round)
        self.current = Coreset(
            indices=selection.indices.sort().values.tolist(),
            method=self.method.provenance,
            dataset=self.dataset.name,
            dataset_size=len(self.dataset),
            pool_size=len(self.pool),
            fraction=self.method.fraction,
            effective_fraction=len(selection.indices) / len(self.pool),
            epoch=epoch,
            round=round,
            seconds=seconds,
            gains=[float(g) for g in selection.gains],
        )
        self.sampler.indices = torch.tensor(self.current.indices)
        if not self.method.chooses:
            return {}
        logs = {
            "coreset_images": float(len(self.current.indices)),
            "coreset_effective_fraction": self.current.effective_fraction,
            "coreset_seconds": seconds,
        }
        if previous is not None:
            logs["coreset_overlap"] = self.current.overlap(previous)
        return logs

    def _check(self, indices: Tensor) -> None:
        known = torch.isin(indices, self.pool).all() and len(indices.unique()) == len(indices)
        if not known or len(indices) != self.rounds.length:
            raise RuntimeError(
                f"{self.method} must choose {self.rounds.length} distinct images of its pool, got {len(indices)}"
            )

    def write(self, folder: str | Path) -> Path | None:
        """Write the present coreset beside what else a run leaves, one file per selection.

        Args:
            folder (`str` or `Path`): the output folder.

        Returns:
            `Path` or `None`: `coreset-NNNN.json`, numbered by the training epoch; `None` without a coreset.
        """
        if self.current is None:
            return None
        path = Path(folder) / f"coreset-{int(self.current.epoch):04d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.current.save(path)
        return path

    def save(self, checkpoint: str | Path) -> None:
        """Add the present coreset, if there is one, to a checkpoint folder.

        Args:
            checkpoint (`str` or `Path`): the folder.
        """
        if self.current is not None and self.method.chooses:
            self.current.save(Path(checkpoint) / _FILE)

    def load(self, checkpoint: str | Path) -> None:
        """Take the coreset of a checkpoint up again; a checkpoint of the warm-up has none.

        Args:
            checkpoint (`str` or `Path`): the folder.
        """
        path = Path(checkpoint) / _FILE
        if path.is_file():
            self.current = Coreset.load(path)
            self.sampler.indices = torch.tensor(self.current.indices)

    def restart(self, folder: str | Path | None = None) -> None:
        """Forget the present coreset, before a training starts anew or takes one up from a checkpoint.

        Args:
            folder (`str` or `Path`, *optional*): an output folder, whose coreset files an earlier run has left: they
                go, so that nobody takes them for those of the run that begins.
        """
        self.current, self.sampler.indices = None, None
        for file in Path(folder).glob("coreset-*.json") if folder is not None else ():
            if file.stem.removeprefix("coreset-").isdigit():
                file.unlink()
