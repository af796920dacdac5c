"""What the figures of an evaluation mean, in words: names of metrics, a summary, what limits a comparison."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

from .report import binomial_interval, describe_metric

__all__ = [
    "NORMS",
    "PRESETS",
    "STAGES",
    "attack_metrics",
    "images_of",
    "interval_of",
    "kind_title",
    "metric_title",
    "percent",
    "report_fields",
    "reservations",
    "summary_sentence",
    "title_of",
    "written",
]

STAGES: Mapping[str, str] = MappingProxyType(
    {
        "apgd-ce": "raises the cross-entropy, step size chosen on the way",
        "apgd-dlr": "lowers the margin of the right class, step size chosen on the way",
        "apgd-t": "aims at one wrong class after another",
        "fab-t": "looks for the smallest change that crosses into a wrong class",
        "square": "tries random squares, sees no gradients",
    }
)
PRESETS: Mapping[str, str] = MappingProxyType(
    {
        "standard": "the benchmark's setting, all attacks at full length",
        "fast": "the two APGD attacks alone; the full set can only lower the accuracy",
        "smoke": "a few steps to see that everything runs; no figure to compare",
    }
)
NORMS: Mapping[str, str] = MappingProxyType(
    {
        "linf": "no pixel changes by more than eps (L-inf)",
        "l2": "the change of the whole image is no longer than eps (L2)",
        "l1": "the changes of all pixels sum up to no more than eps (L1)",
    }
)
_METRICS = MappingProxyType(
    {
        "accuracy": "Accuracy on clean images",
        "standard_accuracy": "Accuracy on clean images",
        "cifar10c_mean_accuracy": "CIFAR-10-C, mean accuracy",
        "cifar100c_mean_accuracy": "CIFAR-100-C, mean accuracy",
        "generated_corruptions_mean_accuracy": "Generated corruptions, mean accuracy (not the published images)",
    }
)
_PARTS = MappingProxyType({"fast": "AutoAttack's two APGD attacks", "smoke": "AutoAttack cut short"})
_SHORT = {"linf": "L-inf", "l2": "L2", "l1": "L1"}
_RESNET18 = 11.2e6  # parameters, with a head of 10 classes
_TEST_IMAGES = 8000  # of STL-10, the smallest test set of the leaderboard


def metric_title(name: str) -> str:
    """Name a metric for people.

    Args:
        name (`str`): a key of a report's `metrics`.
    """
    return _METRICS.get(name) or describe_metric(name)["title"]


def kind_title(kind: str, preset: str | None = "standard") -> str:
    """Name a kind of images for people: `"clean"`, `"PGD-20"`, `"AutoAttack"`.

    Args:
        kind (`str`): a key of a report's `classes["accuracies"]`.
        preset (`str`, *optional*): of AutoAttack; a part of it is not called by the name of the whole.
    """
    if kind == "autoattack":
        return _PARTS.get(str(preset), "AutoAttack")
    return re.sub(r"^pgd(\d+)$", r"PGD-\1", kind).replace("_", " ")


def attack_metrics(metrics: Mapping[str, float]) -> list[str]:
    """List the accuracies under attack, the one that counts first.

    Args:
        metrics (`Mapping[str, float]`): of a report.

    Returns:
        `list[str]`: AutoAttack's first, whatever it found, as PGD may be as low by chance; then from the lowest.
    """
    attacked = [name for name in metrics if "attack" in describe_metric(name)]
    return sorted(attacked, key=lambda name: (not name.startswith("autoattack"), metrics[name]))


def summary_sentence(report: Any) -> str:
    """Say the result in a sentence or two.

    Args:
        report ([`EvaluationReport`] or `Mapping`): as in [`write_html_report`].

    Returns:
        `str`: plain text: right answers on clean images, under the strongest attack, under corruptions.
    """
    values = report_fields(report)
    metrics, said = dict(values["metrics"]), []
    clean = next((name for name in ("accuracy", "standard_accuracy") if name in metrics), None)
    model, dataset = title_of(values.get("model"), "The model"), title_of(values.get("dataset"), "the data set")
    subject = f"{model} classifies"
    if clean is not None:
        count = images_of(values, clean)
        images = f"{count:,} images" if count else "the images"
        said.append(f"{subject} {percent(metrics[clean])} of {images} of {dataset} correctly.")
        subject = "It classifies"
    if attack_metrics(metrics):
        said += _attacked(values, subject)
        subject = "It classifies"
    corrupted = next((name for name in metrics if name.endswith("_mean_accuracy")), None)
    if corrupted:
        generated = corrupted.startswith("generated")
        kind = "images with generated corruptions" if generated else metric_title(corrupted).partition(",")[0]
        said.append(f"{subject} {percent(metrics[corrupted])} of {kind} correctly, in the mean.")
    return " ".join(said) or "Nothing was classified: see the metrics below."


def _attacked(values: Mapping[str, Any], subject: str) -> list[str]:
    worst = attack_metrics(values["metrics"])[0]
    about, interval = describe_metric(worst), interval_of(values, worst)
    attack = about["title"].partition(" accuracy")[0].rstrip(",")
    margin = f" (95 % interval {percent(interval[0])} to {percent(interval[1])})" if interval else ""
    value, budget = percent(values["metrics"][worst]), f"changes of at most eps {about['eps']}"
    said = [f"{subject} {value} correctly{margin} when {attack} may make {budget} ({_SHORT[about['norm']]})."]
    if about["attack"] != "autoattack":
        said.append("The full AutoAttack, which finds more, was not run, so this is an upper bound.")
    elif values.get("preset") in ("fast", "smoke"):
        said.append(f"It ran with the preset {values['preset']!r}, so this is an upper bound.")
    return said


def reservations(report: Any, row: Mapping[str, Any]) -> list[str]:
    """Say what stands in the way of comparing a report with a row of the leaderboard.

    Args:
        report ([`EvaluationReport`] or `Mapping`): ours.
        row (`Mapping`): of [`LeaderboardRow.to_dict`].

    Returns:
        `list[str]`: sentences, the first about the published figures.
    """
    values = report_fields(report)
    said = ["Published figures are of a ResNet-18, standard AutoAttack at 8/255 (L-inf), on the whole test set."]
    count = images_of(values, "accuracy")
    if count and count < _TEST_IMAGES:
        said.append(f"Ours are of {count:,} images: mind the intervals above.")
    if values.get("preset") in ("fast", "smoke"):
        said.append(f"Ours ran AutoAttack with the preset {values['preset']!r}, a weaker attack.")
    parameters = report_fields(values.get("model")).get("parameters")
    if parameters and not 0.9 < parameters / _RESNET18 < 1.1:
        said.append(
            f"Ours has {_millions(parameters)} parameters, a ResNet-18 {_RESNET18 / 1e6:.1f} million: another network."
        )
    size = report_fields(values.get("dataset")).get("image_size")
    if size and row.get("image_size") and size != row["image_size"]:
        said.append(f"Ours saw images of {size} pixels, published are {row['image_size']}.")
    return [*said, *([str(row["note"])] if row.get("note") else [])]


def _millions(count: float) -> str:
    return f"{count / 1e6:.1f} million" if count >= 1e5 else f"{count:,.0f}"


def report_fields(report: Any) -> dict[str, Any]:
    """Give the fields of a report, or of a part of it, by name.

    Args:
        report (`Mapping`, dataclass, `str` or `None`): a text or `None` has no fields.

    Raises:
        TypeError: for anything else.
    """
    if report is None or isinstance(report, str):
        return {}
    if isinstance(report, Mapping):
        return dict(report)
    if is_dataclass(report) and not isinstance(report, type):
        return {entry.name: getattr(report, entry.name) for entry in fields(report)}
    raise TypeError(f"got a {type(report).__name__}; a report is an EvaluationReport or a mapping: pass one of these")


def title_of(part: Any, default: str) -> str:
    """Name the model or data set of a report: its `name`, or the text that stands in its place."""
    return part if isinstance(part, str) else str(report_fields(part).get("name") or default)


def images_of(values: Mapping[str, Any], metric: str) -> int | None:
    """Count the images behind a metric: the report's `n`, for all metrics or by name; of corruptions in each cell."""
    n = values.get("n")
    if isinstance(n, Mapping):
        return n.get(metric)
    cell = report_fields(values.get("corruptions")).get("n") if metric.endswith("_mean_accuracy") else None
    return n if cell is None else int(cell)


def interval_of(values: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """Find the 95 % interval of a metric: the report's, or else the one that its count of images gives.

    A mean over corruptions sees the same images many times: it has an interval only where the report gives one.
    """
    stored = (values.get("intervals") or {}).get(metric)
    if stored is not None:
        return float(stored[0]), float(stored[1])
    count = images_of(values, metric)
    return (
        None if not count or metric.endswith("_mean_accuracy") else binomial_interval(values["metrics"][metric], count)
    )


def percent(share: float, digits: int = 1) -> str:
    """Write a share of [0, 1] in percent."""
    return f"{100 * share:.{digits}f} %"


def written(value: Any) -> str:
    """Write any value of a report for people: lists with commas, long ones cut, floats short."""
    if isinstance(value, Mapping):
        nested = any(isinstance(item, Mapping) for item in value.values())
        between = "; " if nested else ", "
        return between.join(f"{str(name).replace('_', ' ')} {written(item)}" for name, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        shown = ", ".join(written(item) for item in value[:12])
        return f"{shown} and {len(value) - 12} more" if len(value) > 12 else shown
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
