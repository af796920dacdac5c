"""Accuracy of a classifier on clean and on attacked images, counted batch by batch, shared between processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from ..attacks import PGD
from ..data import ImageDataset, collate_images
from ..views import Views
from .linear_probe import check_features
from .report import attack_metric_name

__all__ = ["Accuracy", "Logits", "measure_accuracy", "progress_bar"]

Logits = Callable[[Tensor], Tensor]
PROGRESS_DELAY = 3.0  # seconds of silence, so that a quick measurement leaves no bar behind


@dataclass(frozen=True)
class Accuracy:
    """What was counted, and how.

    Args:
        standard (`float`): share of right answers on clean images, in [0, 1].
        attacked (`float`, *optional*): the same on attacked images; `None` when nothing was attacked.
        n (`int`): images.
        attack ([`PGD`], *optional*): the attack.
    """

    standard: float
    attacked: float | None
    n: int
    attack: PGD | None

    def to_dict(self) -> dict[str, float]:
        """Give the accuracies under names that carry the attack.

        Returns:
            `dict[str, float]`: for example `standard_accuracy` and `pgd20_linf_8_255_accuracy`, in [0, 1].
        """
        values = {"standard_accuracy": self.standard}
        if self.attack is not None and self.attacked is not None:
            values[attack_metric_name(f"pgd{self.attack.steps}", self.attack.norm, self.attack.eps)] = self.attacked
        return values


def measure_accuracy(
    logits: Logits,
    dataset: ImageDataset,
    *,
    size: int,
    attack: PGD | None = None,
    view: str = "original",
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    shared: bool = False,
    progress: bool = False,
) -> Accuracy:
    """Count right answers on clean images and under PGD on the cross-entropy, in float32.

    Every image is attacked, also one that is misclassified already, and the last iterate counts. Hold the network
    with `hf_robust.attacks.frozen` around the call, so that it is in evaluation mode and the attack differentiates
    the images only. Random starts depend on seed and batch number alone: neither the global random state nor the
    number of processes matters.

    Args:
        logits (`Callable[[Tensor], Tensor]`): images `(N, 3, S, S)` in [0, 1] to logits `(N, C)`.
        dataset ([`ImageDataset`]): labelled images.
        size (`int`): side S in pixels.
        attack ([`PGD`], *optional*): default: clean images only.
        view (`str`, defaults to `"original"`): the view that is classified, see [`Views`].
        batch_size (`int`, defaults to 256): images per batch.
        seed (`int`, defaults to 0): of random views and starts.
        device (`str` or `torch.device`): where the images are sent.
        shared (`bool`, defaults to `False`): the processes share the batches and all of them call.
        progress (`bool`, defaults to `False`): show a bar when it takes more than a few seconds.

    Returns:
        [`Accuracy`]: the same on every process.

    Raises:
        ValueError: for images without labels, an impossible batch size or logits that are not finite.

    Source: PGD-20 of RobustSSL_Benchmark@19dc714, `Finetuning_Methods/Vanilla_Finetuning/utils.py` (evaluation mode,
        cross-entropy, uniform start, last iterate).
    """
    if dataset.labels is None:
        raise ValueError(f"accuracy needs labels, {dataset.name!r} has none: name its label column (label_column=...)")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}: 256 is the default")
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared and _distributed() else (0, 1)
    views, device = Views(size=size), torch.device(device)
    right = torch.zeros(2, dtype=torch.int64, device=device)
    title = f"{f'PGD-{attack.steps}' if attack else 'accuracy'} on {dataset.name}"
    starts = range(0, len(dataset), batch_size)
    with progress_bar(len(dataset), title, progress) as bar, torch.autocast(device.type, enabled=False):
        for number in range(rank, len(starts), world):
            rows = range(starts[number], min(starts[number] + batch_size, len(dataset)))
            batch = collate_images([dataset[k] for k in rows])
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + number)
            x = views(batch["image"].to(device), [view], generator=generator)[view]
            right += _count(logits, x, batch["label"].to(device), attack, generator)
            bar.update(len(rows))
    if world > 1:
        dist.all_reduce(right)
    standard, attacked = (int(count) / len(dataset) for count in right)
    return Accuracy(standard, attacked if attack else None, len(dataset), attack)


def _count(logits: Logits, x: Tensor, labels: Tensor, attack: PGD | None, generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        standard = _right(logits(x), labels)
    if attack is None:
        return torch.stack([standard, torch.zeros_like(standard)])
    x_adv = attack(partial(_summed_loss, logits, labels), x, generator=generator)
    with torch.no_grad():
        return torch.stack([standard, _right(logits(x_adv), labels)])


def _summed_loss(logits: Logits, labels: Tensor, images: Tensor) -> Tensor:
    # The sum, not the mean: each image's gradient is its own, whatever batch it sits in.
    return cross_entropy(logits(images).float(), labels, reduction="sum")


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (check_features(logits).argmax(1) == labels).sum()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def progress_bar(total: int, title: str, progress: bool) -> tqdm:
    """A bar over images that appears after a few seconds only.

    Args:
        total (`int`): images.
        title (`str`): what is done with them.
        progress (`bool`): `False` for no bar at all.
    """
    return tqdm(total=total, desc=title, unit="image", delay=PROGRESS_DELAY, disable=not progress, leave=False)
