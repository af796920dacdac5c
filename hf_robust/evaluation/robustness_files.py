"""The files of an evaluation: report, flags, pictures, and one page that shows them."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..attacks import PGD
from .evaluation_report import EvaluationReport
from .html_report import PICTURES, write_html_report
from .judged_images import JudgedImages
from .pictures import plot_examples
from .pixel_classifier import PixelClassifier
from .report import describe_metric
from .report_texts import kind_title
from .robustness_pictures import plot_class_bars, plot_corruptions, plot_robustness_curve

__all__ = ["write_evaluation"]

_SHOWN, _LOOKED_AT = 5, 500  # rows of examples.png, and images among which they are chosen


def write_evaluation(
    report: EvaluationReport, folder: str | Path, classifier: PixelClassifier, images: JudgedImages
) -> list[str]:
    """Write `report.json`, `flags.npz`, the pictures that there is something to draw for, and `report.html`.

    Args:
        report ([`EvaluationReport`]): what was found.
        folder (`str` or `Path`): made when missing; pictures of an earlier evaluation there go.
        classifier ([`PixelClassifier`]): held by the caller, for the images that are attacked once more to be shown.
        images ([`JudgedImages`]): what was judged.

    Returns:
        `list[str]`: names of the files.
    """
    folder = Path(folder)
    report.save(folder)
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
    if report.curve:
        chance = 1 / classifier.num_classes if classifier.num_classes else None
        plot_robustness_curve(
            {str(report.model.get("name") or "model"): {eps: value for eps, value in report.curve["points"]}},
            folder / "robustness_curve.png",
            n=int(report.curve["n"]),
            chance=chance,
            attack=f"PGD-{report.curve['steps']}",
            norm=report.norm,
            marked_eps=report.eps,
        )
    if report.corruptions:
        table = {n: {int(k): v for k, v in row.items()} for n, row in report.corruptions["table"].items()}
        title, n = f"Accuracy on {report.corruptions['name']}", int(report.corruptions["n"])
        clean = report.metrics["accuracy"]
        plot_corruptions(table, folder / "corruptions.png", clean=clean, title=title, n=n)
    _draw_classes(report, folder)
    if any("attack" in describe_metric(name) for name in report.metrics) and report.norm != "l1":
        _draw_examples(report, folder, classifier, images)
    write_html_report(report, folder)
    files = ("report.json", "flags.npz", "report.html", *PICTURES)
    return [name for name in files if (folder / name).is_file()]


def _draw_classes(report: EvaluationReport, folder: Path) -> None:
    accuracies = {
        kind_title(kind, report.preset): [math.nan if v is None else v for v in values]
        for kind, values in report.classes["accuracies"].items()
    }
    plot_class_bars(
        accuracies,
        folder / "classes.png",
        label_names=report.classes["names"],
        counts=report.classes["counts"],
    )


def _draw_examples(report: EvaluationReport, folder: Path, classifier: PixelClassifier, images: JudgedImages) -> None:
    """A few images under PGD-20; the classes in turn, so that not all are of the first one."""
    labels = images.labels[:_LOOKED_AT]
    seen_before = torch.stack([(labels[:k] == labels[k]).sum() for k in range(len(labels))])
    some = images.part(seen_before.argsort(stable=True)[:_SHOWN])
    x = some.pixels(range(len(some)), classifier.image_size, classifier.device)
    if x.shape[1] != 3:
        return
    names = images.label_names or classifier.label_names
    attack = PGD(report.eps, report.eps / 4, 20, report.norm)  # type: ignore[arg-type]
    path = folder / "examples.png"
    plot_examples({"model": classifier}, x, some.labels, path, attack=attack, label_names=names, seed=report.seed)
