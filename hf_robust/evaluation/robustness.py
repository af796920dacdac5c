"""Robustness of a classifier as the benchmark measures it: clean, PGD, AutoAttack and corruption accuracy, resumable.

The attacks see a [`PixelClassifier`], so that budgets are counted in pixels of [0, 1] whatever normalisation the
network wants. Every part notes its finished batches in `output_dir/state`; the same call after a kill goes on there.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attacks import PGD
from ..data import ImageDataset
from .classifier import PixelClassifier, load_classifier
from .evaluation_job import PRESETS, EvaluationJob
from .evaluation_parts import EvaluationParts, world
from .evaluation_report import EvaluationReport
from .judged_images import JudgedImages
from .report import format_eps

__all__ = ["METRICS", "check_needs", "check_settings", "evaluate_robustness", "plan_metrics"]

METRICS = ("accuracy", "pgd20", "autoattack", "corruptions")
_PGD = re.compile(r"pgd(\d+)")


def evaluate_robustness(
    model: str | Path | nn.Module | Callable[[Tensor], Any],
    dataset: ImageDataset | tuple[Tensor, Tensor],
    metrics: Sequence[str] = METRICS,
    *,
    eps: float = 8 / 255,
    norm: Literal["linf", "l2", "l1"] = "linf",
    preset: Literal["standard", "fast", "smoke"] = "standard",
    n_examples: int | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = True,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    progress: bool = True,
    corruptions: str | Path | None = None,
    curve_examples: int = 200,
    split: str | None = None,
    command: str | None = None,
    **loading: Any,
) -> EvaluationReport:
    """Measure what a classifier withstands, on the same images for every metric.

    The network is held in evaluation mode, in float32 and without gradients of its own, and put back afterwards. With
    several processes (`accelerate launch`) all of them call, share the images and get the same report; the first one
    writes the files.

    Args:
        model (`str`, `Path`, `nn.Module`, `Callable` or [`PixelClassifier`]): see [`load_classifier`].
        dataset ([`ImageDataset`] or pair of tensors): labelled images; floats must be pixels in [0, 1].
        metrics (`Sequence[str]`): of `"accuracy"`, `"pgd20"` (or another number of steps), `"autoattack"` and
            `"corruptions"`; clean accuracy is always there.
        eps (`float`, defaults to 8/255, as published): budget, pixels in [0, 1].
        norm (`str`, defaults to `"linf"`): `"linf"`, `"l2"`, or for AutoAttack alone `"l1"`.
        preset (`str`, defaults to `"standard"`): of AutoAttack; only this one is called so in the report.
        n_examples (`int`, *optional*): judge so many images, of each class its share; default: all.
        seed (`int`, defaults to 0): of that choice, the random starts and AutoAttack.
        output_dir (`str` or `Path`, *optional*): receives `report.json`, `flags.npz`, `report.html`, pictures, and
            `state/` while it runs; default: nothing is written, and nothing can be resumed.
        resume (`bool`, defaults to `True`): go on from what `output_dir` holds; `False` starts over.
        batch_size (`int`, defaults to 128): images per batch; random draws depend on it.
        device (`str` or `torch.device`, *optional*): default: where the model is; for files a GPU if there is one.
        progress (`bool`, defaults to `True`): show bars with the time left.
        corruptions (`str` or `Path`, *optional*): the published arrays (CIFAR-10-C, CIFAR-100-C): folder, tar or Hub
            repository; default: corruptions are generated from `dataset` and called so.
        curve_examples (`int`, defaults to 200): beside a PGD metric, draw accuracy over budgets up to 32/255 on so
            many of the images, the check that the attack works; 0: no curve.
        split (`str`, *optional*): of the data set, for the report.
        command (`str`, *optional*): the command line, for the report.
        loading (`Any`): passed on to [`load_classifier`], such as `image_size`, `mean` and `std`.

    Returns:
        [`EvaluationReport`]: accuracies named by attack, intervals, flags of every image, warnings.

    Raises:
        ImportError: for `"autoattack"` without the extra `[eval]`.
        FileNotFoundError: when there is no such model.
        ValueError: for an unknown metric or an impossible setting, images that are normalised already, labels that
            the model does not have, logits that are not finite, or an `output_dir` of another evaluation.

    Source: the metrics of RobustSSL_Benchmark@19dc714, `Finetuning_Methods/Vanilla_Finetuning/utils.py`, where "robust
        accuracy" is standard AutoAttack at 8/255.
    """
    plan = plan_metrics(metrics, norm)
    check_settings(eps, norm, preset, batch_size=batch_size, seed=seed, curve_examples=curve_examples)
    check_needs(plan, corruptions)
    classifier = _placed(load_classifier(model, **loading), model, device)
    images = JudgedImages.of(dataset, n_examples, seed)
    notes = [*classifier.notes, *_mode_note(model, classifier), *_budget_note(eps, norm)]
    with classifier.held():
        images, renamed = _numbered_alike(classifier, images)
        notes += renamed
        logits = _check_fit(classifier, images)
        size = classifier.image_size
        tag = {
            "model": classifier.fingerprint(),
            "images": images.fingerprint(),
            "n": len(images),
            "image_size": size,
            "seed": seed,
            "batch_size": batch_size,
            "logits": logits.tolist(),
        }
        folder = None if output_dir is None else Path(output_dir)
        parts = EvaluationParts(None if folder is None else folder / "state", tag, resume)
        job = EvaluationJob(classifier, images, parts, eps, norm, preset, seed, batch_size, progress, corruptions)
        job.warnings += notes
        job.clean()
        for name in plan:
            job.run(name)
        if curve_examples and any(_PGD.fullmatch(name) for name in plan):
            job.curve(curve_examples)
        report = job.report(split, command)
        if folder is not None and world()[0] == 0:
            from .robustness_files import write_evaluation

            write_evaluation(report, folder, classifier, images)
    return report


def plan_metrics(metrics: Sequence[str], norm: str = "linf") -> list[str]:
    """Check metrics and put the cheap ones first.

    Args:
        metrics (`Sequence[str]`): see [`evaluate_robustness`].
        norm (`str`): of the attacks.

    Returns:
        `list[str]`: without repetition.

    Raises:
        ValueError: for an unknown metric, or PGD in a norm that it does not know.
    """
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    if not names:
        raise ValueError(f"metrics is empty: choose among {', '.join(METRICS)}")
    for name in names:
        match = _PGD.fullmatch(name)
        if match is None and name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            if "," in name:
                raise ValueError(f"metrics stand apart, got {name!r}: leave spaces between them, without commas")
            raise ValueError(f"unknown metric {name!r}: {hint}known are {', '.join(METRICS)} (pgdN: N steps)")
        if match and (norm == "l1" or int(match[1]) < 1):
            raise ValueError(
                f"{name} with norm {norm!r}: PGD takes one step or more and the norms linf and l2; for l1 leave it out"
            )
    order = ("accuracy", "pgd", "corruptions", "autoattack")
    return sorted(dict.fromkeys(names), key=lambda name: next(k for k, o in enumerate(order) if name.startswith(o)))


def check_settings(
    eps: float, norm: str, preset: str, *, batch_size: int = 128, seed: int = 0, curve_examples: int = 200
) -> None:
    """Refuse settings that a part of the evaluation would refuse after hours.

    Args:
        eps, norm, preset, batch_size, seed, curve_examples: see [`evaluate_robustness`].

    Raises:
        ValueError: for a value outside of its range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}: 'standard' is AutoAttack")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("curve_examples", curve_examples, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}: leave it out for the default")
    if norm == "l1" and not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive, got {eps}: common for l1 on CIFAR-10 is 12")
    if norm != "l1":
        PGD(eps, eps / 4, 1, norm)  # type: ignore[arg-type]


def check_needs(plan: Sequence[str], corruptions: str | Path | None = None) -> None:
    """Look for what metrics need from outside now, not when their turn comes.

    Args:
        plan (`Sequence[str]`): metrics.
        corruptions (`str` or `Path`, *optional*): the published arrays.

    Raises:
        ImportError: for `"autoattack"` without the extra `[eval]`.
        FileNotFoundError: when the arrays are not there.
        ValueError: for other arrays, or arrays without the metric.
    """
    if "autoattack" in plan:
        from .autoattack import _package

        _package()
    if corruptions is None:
        return
    if "corruptions" not in plan:
        raise ValueError(
            f"corruptions={str(corruptions)!r} are images for the metric 'corruptions', which is not asked for "
            f"({', '.join(plan)}): add it to metrics, or leave them out"
        )
    from .corruptions import load_published_corruptions

    load_published_corruptions(corruptions, "brightness", 1)


def _placed(classifier: PixelClassifier, source: Any, device: str | torch.device | None) -> PixelClassifier:
    """What was read from files goes to the device; what the caller made stays where it is."""
    if isinstance(source, str | Path):
        local = int(os.environ.get("LOCAL_RANK", 0))
        automatic = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        return classifier.to(device if device is not None else automatic)
    if device is not None and torch.empty(0, device=device).device != classifier.device:
        raise ValueError(
            f"device is {str(device)!r} and the model is on {str(classifier.device)!r}: move the model, or leave "
            "device out"
        )
    return classifier


def _budget_note(eps: float, norm: str) -> list[str]:
    """The default of one norm is next to nothing in another."""
    usual = {"l2": 0.5, "l1": 12}.get(norm)
    if usual is None or eps >= usual / 10:
        return []
    return [
        f"The budget eps {format_eps(eps)} is that of the whole image in {norm.upper()}, where {usual} is usual on "
        "CIFAR-10: attacks can hardly change anything, so accuracies under attack say little."
    ]


def _mode_note(source: Any, classifier: PixelClassifier) -> list[str]:
    """Worth a sentence only where the mode changes what a layer does."""
    layers = [layer for network in classifier.networks for layer in network.modules() if layer.training]
    depends = any("Drop" in type(layer).__name__ or hasattr(layer, "running_mean") for layer in layers)
    if not depends or isinstance(source, PixelClassifier):
        return []
    return ["The model came in training mode; it was evaluated in evaluation mode, and put back afterwards."]


def _numbered_alike(classifier: PixelClassifier, images: JudgedImages) -> tuple[JudgedImages, list[str]]:
    """The images with the numbers that the model gives to their classes; what is worth a note."""
    ours, theirs = classifier.label_names, images.label_names
    if not ours or not theirs or theirs == ours:
        return images, []
    unique = len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs) > int(images.labels.max())
    if unique and set(theirs) <= set(ours):  # in another order, or without some: a split may lack a class
        return images.numbered_as(ours), []
    for name in theirs:
        if unique and name in ours and ours.index(name) != theirs.index(name):
            raise ValueError(
                f"the class {name!r} is number {ours.index(name)} of the model and number {theirs.index(name)} of "
                f"{images.name!r}, which would count right answers as wrong: evaluate on the data set it was trained "
                "for, or give the classes the names that the model has"
            )
    return images, [
        f"The classes of the model are called {', '.join(ours[:3])} ..., those of the data set "
        f"{', '.join(theirs[:3])} ...: they are compared by their numbers."
    ]


@torch.no_grad()
def _check_fit(classifier: PixelClassifier, images: JudgedImages) -> Tensor:
    """Whether the model takes these images and has their labels, by one image; its logits."""
    x = images.pixels(range(0, 1), classifier.image_size, classifier.device)
    try:
        logits = classifier(x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"the model cannot classify an image of the shape {tuple(x.shape[1:])} ({str(error).splitlines()[0]}): "
            "give image_size, or images with as many colours as it takes"
        ) from error
    classes, highest = logits.shape[1], int(images.labels.max())
    if highest >= classes:
        raise ValueError(
            f"the labels of {images.name!r} go up to {highest} and the model has {classes} outputs, labels must be in "
            f"0..{classes - 1}: evaluate on the data set it was trained for, or number the classes from 0"
        )
    return logits[0].cpu()
