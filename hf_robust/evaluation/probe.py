"""How good frozen features are: a linear probe, its accuracy, and its accuracy under PGD-20.

The probe is quick enough to run during pre-training and has no random part, so that two encoders differ by their
features and not by the luck of a classifier. It measures; it is not the published fine-tuning protocol (SLF).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attacks import PGD
from ..data import ImageDataset, collate_images
from ..views import Views
from .accuracy import measure_accuracy, progress_bar
from .linear_probe import WEIGHT_DECAY, check_features, fit_linear_probe
from .report import attack_metric_name

__all__ = [
    "ProbeResult",
    "attack_metric_name",
    "extract_features",
    "fit_linear_probe",
    "probe_encoder",
    "stratified_indices",
]

Features = Callable[[Tensor], Tensor]


@dataclass
class ProbeResult:
    """What one probe measured, with everything needed to measure it again.

    Args:
        standard_accuracy (`float`): fraction of right answers on clean images, in [0, 1].
        pgd20_accuracy (`float`): fraction of right answers under PGD with `steps` steps (20 unless asked
            otherwise; the metric's name in `to_dict` carries the true number), in [0, 1].
        n_train (`int`): images the head was fitted on.
        n_eval (`int`): images both accuracies were counted on.
        eps (`float`): budget of the attack, L-inf, pixels in [0, 1].
        step_size (`float`): step of the attack, same unit.
        steps (`int`): steps of the attack.
        seconds (`float`): wall time of features, fit and attack.
        seed (`int`): seed of the subsets and of the random start.
        batch_size (`int`): images per batch; the random start is drawn batch by batch.
        weight_decay (`float`): of the head, see `fit_linear_probe`.
        train_name (`str`): name of the data set the head was fitted on.
        eval_name (`str`): name of the data set it was judged on.
        head (`nn.Linear`): the fitted head, raw features to logits.
    """

    standard_accuracy: float
    pgd20_accuracy: float
    n_train: int
    n_eval: int
    eps: float
    step_size: float
    steps: int
    seconds: float
    seed: int = 0
    batch_size: int = 256
    weight_decay: float = WEIGHT_DECAY
    train_name: str = ""
    eval_name: str = ""
    head: nn.Linear | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, float]:
        """Give the accuracies under names that carry the attack.

        Returns:
            `dict[str, float]`: for example `standard_accuracy` and `pgd20_linf_8_255_accuracy`, in [0, 1].
        """
        attacked = attack_metric_name(f"pgd{self.steps}", "linf", self.eps)
        return {"standard_accuracy": self.standard_accuracy, attacked: self.pgd20_accuracy}

    def to_result(self, model: str) -> dict[str, Any]:
        """Give the entry of `EncoderReport.results` for this probe.

        Args:
            model (`str`): name of the encoder that was probed.

        Returns:
            `dict`: metrics and protocol, plain Python.
        """
        attack = {"norm": "linf", "eps": self.eps, "step_size": self.step_size, "steps": self.steps}
        return {
            "model": model,
            "metrics": self.to_dict(),
            "protocol": "linear probe",
            "n_train": self.n_train,
            "n_eval": self.n_eval,
            "seed": self.seed,
            "attack": {**attack, "random_start": True, "loss": "cross-entropy", "iterate": "last"},
            "weight_decay": self.weight_decay,
            "batch_size": self.batch_size,
            "train_dataset": self.train_name,
            "dataset": {"name": self.eval_name},
            "seconds": self.seconds,
        }


@torch.no_grad()
def extract_features(
    features: Features,
    dataset: ImageDataset,
    *,
    size: int,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Tensor:
    """Compute the features of every image of a data set, without gradients.

    Args:
        features (`Callable[[Tensor], Tensor]`): images `(N, 3, S, S)` in [0, 1] to features `(N, D)`, in the mode
            (evaluation, norm branch) the caller has set.
        dataset (`ImageDataset`): the images.
        size (`int`): side S in pixels the images are brought to, as the view `"original"`.
        batch_size (`int`, defaults to 256): images per call.
        device (`str` or `torch.device`, *optional*): where the images are sent; default: the device of the module
            that `features` is, belongs to or names (as in `lambda x: model.features(x, "adv")`), else the CPU.
        progress (`bool`, defaults to `False`): show a bar when it takes more than a few seconds.

    Returns:
        `torch.Tensor` of shape `(N, D)`: float32, on the CPU.

    Raises:
        ValueError: for features that are not 2-d or not finite.
    """
    device = _device(features, device)
    views, parts = Views(size=size), []
    with progress_bar(len(dataset), f"features of {dataset.name}", progress) as bar, _full_precision(device):
        for images, _ in _batches(dataset, batch_size):
            part = features(views(images.to(device), ["original"])["original"])
            parts.append(check_features(part.detach().float().cpu()))
            bar.update(len(images))
    return torch.cat(parts)


def probe_encoder(
    features: Features,
    train: ImageDataset,
    evaluation: ImageDataset,
    *,
    size: int,
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 20,
    n_train: int | None = None,
    n_eval: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
    weight_decay: float = WEIGHT_DECAY,
    device: str | torch.device | None = None,
) -> ProbeResult:
    """Fit a linear probe on frozen features and measure it on clean and on attacked images.

    The attack sees encoder and head together: PGD on the cross-entropy, L-inf, uniform random start. Every image is
    attacked, also one that is misclassified already, and the last iterate counts. Neither the global random state
    nor modes, parameters or gradients of the model are touched; hold the model with `hf_robust.attacks.frozen`, so
    that it is in evaluation mode and the attack differentiates the images only.

    Args:
        features (`Callable[[Tensor], Tensor]`): images `(N, 3, S, S)` in [0, 1] to features `(N, D)`, differentiable.
        train (`ImageDataset`): labelled images for the head.
        evaluation (`ImageDataset`): labelled images for the accuracies.
        size (`int`): side S in pixels.
        eps (`float`, defaults to 8/255, as published): budget, pixels in [0, 1].
        step_size (`float`, defaults to 2/255, as published): step, same unit.
        steps (`int`, defaults to 20, as published): gradient steps.
        n_train (`int`, *optional*): use a class-stratified subset; default, or
            when the data set has fewer: all.
        n_eval (`int`, *optional*): the same for the evaluation.
        batch_size (`int`, defaults to 256): images per batch.
        seed (`int`, defaults to 0): of the subsets and the random start.
        progress (`bool`, defaults to `True`): show bars with the remaining time when it takes more than seconds.
        weight_decay (`float`, defaults to 1e-3): of the head, see `fit_linear_probe`.
        device (`str` or `torch.device`, *optional*): see `extract_features`.

    Returns:
        `ProbeResult`: both accuracies, the protocol and the fitted head.

    Raises:
        ValueError: for unlabelled data, fewer than two classes, a class in `evaluation` that `train` has not, or
            features that are not 2-d or not finite.

    Source: RobustSSL_Benchmark@19dc714, `Finetuning_Methods/Vanilla_Finetuning/utils.py` for PGD-20 (evaluation
        mode, cross-entropy, start, step and clipping); the head is ours, the released code trains it by SGD.
    """
    started, device = time.perf_counter(), _device(features, device)
    attack = PGD(eps=eps, step_size=step_size, steps=steps, norm="linf", random_start=True)
    train, evaluation = _stratified(train, n_train, seed, "train"), _stratified(evaluation, n_eval, seed, "evaluation")
    train_labels = _labels(train, "train")
    num_classes = _check_classes(train, train_labels, _labels(evaluation, "evaluation"))
    x = extract_features(features, train, size=size, batch_size=batch_size, device=device, progress=progress)
    head = fit_linear_probe(x.to(device), train_labels.to(device), num_classes, weight_decay=weight_decay)
    found = measure_accuracy(
        lambda images: head(features(images).float()),
        evaluation,
        size=size,
        attack=attack,
        batch_size=batch_size,
        seed=seed,
        device=device,
        progress=progress,
    )
    return ProbeResult(
        standard_accuracy=found.standard,
        pgd20_accuracy=cast(float, found.attacked),
        n_train=len(train),
        n_eval=len(evaluation),
        eps=eps,
        step_size=step_size,
        steps=steps,
        seconds=time.perf_counter() - started,
        seed=seed,
        batch_size=batch_size,
        weight_decay=weight_decay,
        train_name=train.name,
        eval_name=evaluation.name,
        head=head,
    )


def _stratified(dataset: ImageDataset, n: int | None, seed: int, role: str) -> ImageDataset:
    if n is None or n >= len(dataset):
        return dataset
    return dataset.subset(stratified_indices(_labels(dataset, role), n, seed))


def stratified_indices(labels: Tensor, n: int, seed: int = 0) -> Tensor:
    """Choose `n` of the samples with the class shares of the whole, at least one of each class.

    Args:
        labels (`torch.Tensor` of shape `(N,)`): classes.
        n (`int`): number of samples to choose, from the number of classes to N.
        seed (`int`, defaults to 0): of an own generator; the global random state is not used.

    Returns:
        `torch.Tensor` of shape `(n,)`: int64 indices, rising.

    Raises:
        ValueError: if `n` is smaller than the number of classes or larger than N.
    """
    classes, counts = labels.unique(return_counts=True)
    if not len(classes) <= n <= len(labels):
        raise ValueError(
            f"got n={n}, a stratified subset needs {len(classes)} (one per class) to {len(labels)} (all) samples: "
            "choose n in that range, or None for all"
        )
    quota = n * counts.double() / len(labels)
    share = quota.floor().long().clamp_min(1)
    # What rounding left over goes to the largest remainders; what "at least one" took comes from the best served.
    while (missing := n - int(share.sum())) != 0:
        gain = (quota - share) if missing > 0 else (share - quota).masked_fill(share == 1, -torch.inf)
        share[gain.argmax()] += 1 if missing > 0 else -1
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, size in zip(classes, share.tolist(), strict=True):
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:size]])
    return torch.cat(chosen).sort().values


def _batches(dataset: ImageDataset, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}: 256 is the default")
    for start in range(0, len(dataset), batch_size):
        batch = collate_images([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        yield batch["image"], batch.get("label")


def _labels(dataset: ImageDataset, role: str) -> Tensor:
    if dataset.labels is None:
        raise ValueError(
            f"the {role} data set {dataset.name!r} has no labels, a probe learns and counts classes: name its label "
            "column (label_column=...), or run without the probe"
        )
    return dataset.labels.cpu()


def _check_classes(train: ImageDataset, train_labels: Tensor, eval_labels: Tensor) -> int:
    classes, judged = set(train_labels.tolist()), set(eval_labels.tolist())
    if len(classes) < 2:
        raise ValueError(
            f"the train data set {train.name!r} has {len(classes)} class, a probe tells at least 2 apart: check its "
            "label column, or take more images"
        )
    if unknown := sorted(judged - classes):
        raise ValueError(
            f"the evaluation data set has the classes {unknown}, which no train image shows, so no probe can know "
            "them: take more train images, or evaluate the known classes only"
        )
    return max(max(classes) + 1, train.num_classes or 0)


def _device(features: Features, device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    seen: list[Any] = [features, getattr(features, "__self__", None)]
    if inspect.isfunction(features):  # such as `lambda x: model.features(x, "adv")`
        names = inspect.getclosurevars(features)
        seen += [*names.nonlocals.values(), *names.globals.values()]
    parameters = (p for item in seen if isinstance(item, nn.Module) for p in item.parameters())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _full_precision(device: torch.device) -> torch.autocast:
    # The published protocol is float32, also when the surrounding training runs in bf16.
    return torch.autocast(device.type, enabled=False)
