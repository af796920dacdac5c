"""The interface of coreset methods: which images an epoch trains on, as indices and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_robust.attacks import PGD
from hf_robust.data import ImageDataset
from hf_robust.objectives.base import Objective

__all__ = ["ChosenCoreset", "Coreset", "CoresetMethod", "Selection", "SelectionTask", "on_cpu"]


@dataclass(frozen=True)
class Coreset:
    """One chosen set, with what is needed to judge it and to use it again.

    Args:
        indices (`list[int]`): positions in the training set that was given to the trainer, ascending.
        method (`str`): the method and its settings.
        dataset (`str`): name of the training set.
        dataset_size (`int`): images of the training set.
        pool_size (`int`): images that could be chosen: the training set without the validation split.
        fraction (`float`): the fraction of the pool that was asked for.
        effective_fraction (`float`): the fraction of the pool that was chosen.
        epoch (`float`): training epoch at which it was chosen, in passes as the published schedules count them.
        round (`int`): round of the sampler from which on it is used.
        seconds (`float`): wall time of the selection.
        gains (`list[float]`): estimated gain of each pick, in the order of the picks; empty where nothing is
            estimated.
    """

    indices: list[int]
    method: str
    dataset: str
    dataset_size: int
    pool_size: int
    fraction: float
    effective_fraction: float
    epoch: float
    round: int
    seconds: float
    gains: list[float] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write the set as JSON.

        Args:
            path (`str` or `Path`): the file; its folder exists.
        """
        Path(path).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> Coreset:
        """Read a file that `save` wrote.

        Args:
            path (`str` or `Path`): the file.

        Returns:
            [`Coreset`]: the set.

        Raises:
            ValueError: if the file cannot be read or is no coreset; nothing of it is executed.
        """
        try:
            stored = json.loads(Path(path).read_text())
            known = {name: stored[name] for name in cls.__dataclass_fields__ if name in stored}
            coreset = cls(**known)
            indices = coreset.indices
            whole = isinstance(indices, list) and len(indices) > 0 and all(type(k) is int for k in indices)
            if not whole or sorted(set(indices)) != indices or indices[0] < 0:
                raise ValueError("its indices are not distinct, ascending, non-negative integers")
            if indices[-1] >= coreset.dataset_size:
                raise ValueError(f"index {indices[-1]} lies outside its {coreset.dataset_size} images")
        except OSError as error:
            raise ValueError(f"cannot read the coreset {str(path)!r} ({error.strerror}): give such a file") from None
        except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{str(path)!r} is no coreset file ({error}): give a coreset-NNNN.json that a selection wrote"
            ) from None
        return coreset

    def overlap(self, other: Coreset) -> float:
        """Share of the images of this set that are in another one, in [0, 1].

        Args:
            other ([`Coreset`]): of the same training set.
        """
        return len(set(self.indices) & set(other.indices)) / len(self.indices)


@dataclass(frozen=True)
class SelectionTask:
    """What the trainer hands to a coreset method when it is time to choose.

    Args:
        model (`Any`): the unwrapped model: frozen, in evaluation mode.
        objective ([`Objective`]): the method that trains; it has the loss of a candidate.
        dataset ([`ImageDataset`]): the training set.
        pool (`torch.Tensor` of shape `(n,)`): positions that may be chosen.
        validation (`torch.Tensor` of shape `(v,)`): positions of the validation split, never trained on.
        budget (`int`): how many images to choose, at most n.
        batch_size (`int`): images of a training step over all processes, the size of a candidate minibatch.
        workers (`int`): processes that load images beside this one, as in training.
        views (`Callable`): uint8 images, labels and a generator in, the batch of the objective out.
        originals (`Callable`): uint8 images `(N, 3, H, W)` to floats in [0, 1] at the size of the views.
        attack ([`PGD`]): the training attack.
        seed (`int`): of the data order; the same for all selections of a run.
        generator (`Callable[[str], torch.Generator]`): a generator of this selection for a named purpose; the same
            name gives the same numbers on every process.
        autocast (`Callable`): the precision of the training.
        progress (`float`): training progress in [0, 1].
        device (`torch.device`): where the model is.
        show_progress (`bool`): draw a progress bar.
        attacked (`Any`, *optional*): what attacks look through, such as a copy in half precision; default: `model`.
    """

    model: Any
    objective: Objective
    dataset: ImageDataset
    pool: Tensor
    validation: Tensor
    budget: int
    batch_size: int
    views: Callable[[dict[str, Tensor], torch.Generator], dict[str, Tensor]]
    originals: Callable[[Tensor], Tensor]
    attack: PGD
    seed: int
    generator: Callable[[str], torch.Generator]
    autocast: Callable[[], AbstractContextManager[Any]]
    progress: float
    device: torch.device
    show_progress: bool = False
    workers: int = 0
    attacked: Any = None

    def seen(self, model: Any = None) -> Any:
        """The network that attacks look through, whatever `model` an objective asks it for; see `StepContext.seen`."""
        return self.model if self.attacked is None else self.attacked


@dataclass(frozen=True)
class Selection:
    """What a method chose.

    Args:
        indices (`torch.Tensor` of shape `(budget,)`): positions in the training set, distinct.
        gains (`list[float]`): estimated gain of each pick, in order; empty where nothing is estimated.
    """

    indices: Tensor
    gains: list[float] = field(default_factory=list)


def on_cpu(generator: torch.Generator) -> torch.Generator:
    """A generator of the CPU with the seed of another one: its permutations do not depend on the device.

    Args:
        generator (`torch.Generator`): of any device, fresh from its seed.
    """
    return torch.Generator().manual_seed(generator.initial_seed())


class CoresetMethod:
    """Base class: indices out, when to choose and from what; the search itself is `select`.

    The attributes are the schedule. A method is a dataclass in a file of this folder; its fields, with their `help`,
    are its flags (prefixed `--coreset_`) and its entry in the model card.

    - `fraction`: share of the pool to choose, in (0, 1];
    - `warmup_epochs`: epochs on the whole pool before the first selection;
    - `interval`: epochs from one selection to the next;
    - `validation_fraction`: share of the training set that is kept out of training, for the selection;
    - `citation`: BibTeX of the method, for the model card.
    """

    citation: ClassVar[str] = ""

    fraction: float
    warmup_epochs: float
    interval: int
    validation_fraction: float

    @property
    def chooses(self) -> bool:
        """Whether anything is left out; false for full data."""
        return self.fraction < 1 or self.validation_fraction > 0

    @property
    def provenance(self) -> str:
        """The method and its settings, as coreset files name them."""
        return repr(self)

    def split(self, images: int, seed: int) -> tuple[Tensor, Tensor]:
        """Set the validation images apart: uniform, without replacement.

        Args:
            images (`int`): size of the training set.
            seed (`int`): of the data order.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: positions of the pool and of the validation split, ascending.

        Source: released code, `ACL_RCS.py`: 99 % for training on CIFAR and STL-10, 99.5 % on ImageNet.
        """
        kept_out = images - int(images * (1 - self.validation_fraction) + 1e-9)
        order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
        return order[kept_out:].sort().values, order[:kept_out].sort().values

    def budget(self, pool: int, batch_size: int) -> int:
        """Images of the coreset: the fraction asked for, to the nearest image.

        Args:
            pool (`int`): images that may be chosen.
            batch_size (`int`): images of a training step over all processes.
        """
        return max(1, round(self.fraction * pool))

    def due(self, epoch: int) -> bool:
        """Whether a new coreset is chosen before an epoch.

        Args:
            epoch (`int`): epochs since the end of the warm-up, from 0.
        """
        return epoch % self.interval == 0

    def check(self, objective: Objective, model: Any, dataset: ImageDataset) -> None:
        """Refuse, before training, what `select` could not do; nothing to refuse by default.

        Args:
            objective ([`Objective`]): the method that trains.
            model (`Any`): the unwrapped model.
            dataset ([`ImageDataset`]): the training set.

        Raises:
            ValueError: with the way out.
        """

    def select(self, task: SelectionTask) -> Selection:
        """Choose `task.budget` images.

        Args:
            task ([`SelectionTask`]): model, images, budget, sources of randomness.

        Returns:
            [`Selection`]: the same on every process.
        """
        raise NotImplementedError


@dataclass
class ChosenCoreset(CoresetMethod):
    """The schedule of methods that choose a fraction, as flags.

    Raises:
        ValueError: for a value outside its range.

    Source: released RCS code, `ACL_RCS.py` (CIFAR and STL-10: 100 warm-up epochs, every 20 epochs, of 1000).
    """

    fraction: float = field(default=0.2, metadata={"help": "Share of the pool to train on; published: 0.05 to 0.2."})
    warmup_epochs: float = field(
        default=100.0, metadata={"help": "Epochs on the whole pool before the first selection; published: 100."}
    )
    interval: int = field(default=20, metadata={"help": "Epochs from one selection to the next; published: 20."})
    validation_fraction: float = field(
        default=0.0, metadata={"help": "Share of the training images kept out of training."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"coreset fraction must be in (0, 1], got {self.fraction}: published are 0.05, 0.1 and 0.2; all "
                "images are --coreset full"
            )
        if not 0 <= self.warmup_epochs < float("inf"):
            raise ValueError(f"coreset warmup_epochs must be 0 or more, got {self.warmup_epochs}: published is 100")
        if not 1 <= self.interval < float("inf") or self.interval != int(self.interval):
            raise ValueError(f"coreset interval must be a whole number of epochs, 1 or more, got {self.interval}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"coreset validation_fraction must be in [0, 1), got {self.validation_fraction}: published are 0.01 "
                "(CIFAR, STL-10) and 0.005 (ImageNet)"
            )
