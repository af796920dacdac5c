"""The report of an evaluation as one HTML file that opens offline, for people: sentence first, numbers after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .html_page import bar, escape, facts, figure, page, paragraph, section, table
from .report import describe_metric, format_eps, write_text
from .report_texts import (
    NORMS,
    PRESETS,
    STAGES,
    attack_metrics,
    images_of,
    interval_of,
    kind_title,
    metric_title,
    percent,
    report_fields,
    reservations,
    summary_sentence,
    title_of,
    written,
)

__all__ = ["HTML_FILE", "PICTURES", "render_html", "write_html_report"]

HTML_FILE = "report.html"
# Files that a report embeds when they lie beside it: what they show, and how to read them.
PICTURES: Mapping[str, tuple[str, str]] = {
    "robustness_curve.png": (
        "Line chart of accuracy over the size of the attack.",
        "Accuracy over the size of the attack. With a large enough budget every classifier fails, so the curve must "
        "come down to zero on its right; one that stays up shows an attack that fails (masked gradients).",
    ),
    "corruptions.png": (
        "Heat map of accuracy for each corruption and severity.",
        "Accuracy on corrupted images, nobody attacks here. Darker cells lost more against clean images.",
    ),
    "classes.png": (
        "Bar chart of accuracy for each class, clean and attacked.",
        "Accuracy class by class: a mean can hide that a few classes are lost.",
    ),
    "examples.png": (
        "Grid of images before and after the attack, with the predictions of the model.",
        "Images before and after the attack, with what the model takes them for: green right, red wrong.",
    ),
}


def write_html_report(
    report: Any, folder: str | os.PathLike[str], *, pictures: Sequence[str | os.PathLike[str]] | None = None
) -> Path:
    """Write `report.html`: one file with everything in it, to be sent around or put beside the weights.

    Args:
        report ([`EvaluationReport`] or `Mapping`): what was measured. Read are `metrics`, `intervals`, `n`, `seed`,
            `eps`, `norm`, `preset`, `stages`, `warnings`, `model`, `dataset`, `leaderboard`, `curve`, `corruptions`,
            `classes` and the provenance; what is missing is left out.
        folder (`str` or `PathLike`): where to write; made when missing.
        pictures (`Sequence`, *optional*): files to embed, in order; default: those of `PICTURES` in the folder.

    Returns:
        `Path`: the file.

    Raises:
        TypeError: for a report that has no fields.
        ValueError: without a metric, for an accuracy outside [0, 1] or a picture of another kind.
    """
    folder = Path(folder)
    found = [folder / name for name in PICTURES if (folder / name).is_file()]
    chosen = found if pictures is None else [Path(path) for path in pictures]
    return write_text(folder / HTML_FILE, render_html(report, chosen))


def render_html(report: Any, pictures: Sequence[Path] = ()) -> str:
    """Write the page of [`write_html_report`] as a text.

    Args:
        report, pictures: as there.

    Returns:
        `str`: the HTML.
    """
    values = report_fields(report)
    _check(values)
    model, dataset = title_of(values.get("model"), "the model"), title_of(values.get("dataset"), "the data set")
    sections = [
        section("", paragraph(summary_sentence(values)), kind="summary"),
        _warnings(values),
        _metrics(values),
        _leaderboard(values),
        _threat_model(values),
        _stages(values),
        section("Pictures", *(figure(path, *_caption(path, values)) for path in pictures)),
        _corruptions(values),
        _classes(values),
        _details("The model", values.get("model")),
        _details("The data", values.get("dataset")),
        _details("How it was measured", _run(values)),
    ]
    made = " ".join(str(text) for text in ("Made by hf_robust", values.get("library_version")) if text)
    footer = f"{made}. The same figures for machines: report.json beside this file."
    return page(f"Robustness of {model}", f"on {dataset}{_when(values)}", sections, footer)


def _warnings(values: Mapping[str, Any]) -> str:
    warnings = [str(text) for text in values.get("warnings") or []]
    if not warnings:
        return ""
    title = "Read this before you trust the figures" if len(warnings) > 1 else "Read this before you trust the figure"
    items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    return section(title, f"<ul>{items}</ul>", kind="warning")


def _metrics(values: Mapping[str, Any]) -> str:
    rows = []
    for name, value in values["metrics"].items():
        if not name.endswith("accuracy"):
            rows.append([f"{escape(metric_title(name))}<small>{escape(name)}</small>", f"{value:,.4g}", "", "", ""])
            continue
        count, interval = images_of(values, name), interval_of(values, name)
        between = "" if interval is None else escape(f"{100 * interval[0]:.1f} to {percent(interval[1])}")
        cells = [
            f"<strong>{escape(percent(value))}</strong>{bar(value)}",
            between,
            f"{count:,}" if count else "",
            _of_metric(values.get("seed"), name),
        ]
        rows.append([f"{escape(metric_title(name))}<small>{escape(name)}</small>", *map(str, cells)])
    note = (
        "The interval says how far another draw of as many images could move the figure; it does not cover another "
        "training run."
    )
    seconds = sum((values.get("seconds") or {}).values())
    note += f" Measured in {_seconds(seconds)} of computing." if seconds else ""
    headings = ("metric", "accuracy", "95 % interval", "images", "seed")
    return section("Results", table(headings, rows, "Metrics of the evaluation"), paragraph(note, "note"))


def _leaderboard(values: Mapping[str, Any]) -> str:
    row = values.get("leaderboard")
    if not row:
        return ""
    row = report_fields(row)
    ours, published = values["metrics"], row["metrics"]
    ours = {("accuracy" if name == "standard_accuracy" else name): value for name, value in ours.items()}
    rows = [
        [escape(metric_title(name)), *_compared(values, name, ours.get(name), value)]
        for name, value in published.items()
    ]
    where = f"{row['source']} to {row['target']}" if row.get("source") != row.get("target") else row.get("target")
    tuned = "" if row.get("fine_tuning") in (None, "vanilla") else " with AutoLoRa"
    said = (
        f"{row['method']}, {str(row['mode']).upper()}{tuned}, {where}, as published by: "
        f"{row.get('origin_title') or row.get('origin')}. {' '.join(reservations(values, row))}"
    )
    title = "Beside the published figures of the same method"
    headings = ("metric", "this model", "published", "difference")
    return section(title, table(headings, rows, "Comparison with the leaderboard"), paragraph(said, "note"))


def _compared(values: Mapping[str, Any], name: str, ours: float | None, published: float) -> list[str]:
    """Cells: our figure, the published one, what lies between."""
    shown = escape(percent(published, 2))
    if ours is None:
        return ["not measured", shown, ""]
    interval = interval_of(values, name if name in values["metrics"] else "standard_accuracy")
    where = "" if interval is None else "inside" if interval[0] <= published <= interval[1] else "outside"
    small = f"<small>published is {where} our interval</small>" if where else ""
    points = f"{100 * (ours - published):+.1f} points".replace("-", "\u2212")
    return [escape(percent(ours)), shown, escape(points) + small]


def _threat_model(values: Mapping[str, Any]) -> str:
    attacked = attack_metrics(values["metrics"])
    if not attacked:
        return ""
    first = describe_metric(attacked[0])
    eps, norm = values.get("eps"), values.get("norm") or first["norm"]
    entries: list[tuple[str, object]] = [
        ("budget", f"eps {first['eps'] if eps is None else format_eps(float(eps))} of pixels in [0, 1]"),
        ("meaning", NORMS.get(str(norm), norm)),
        ("attacker", "knows the model and its weights and changes each test image; the training data stay clean"),
    ]
    if any(name.startswith("pgd") for name in attacked):
        entries.append(("PGD", "from a random start in the budget, steps of a quarter of it, the last image counts"))
    if any(name.startswith("autoattack") for name in attacked):
        preset = str(values.get("preset") or "")
        entries.append(("AutoAttack", f"{preset}: {PRESETS[preset]}" if preset in PRESETS else preset))
    return section("Threat model", facts(entries))


def _stages(values: Mapping[str, Any]) -> str:
    stages = [report_fields(stage) for stage in values.get("stages") or []]
    if not stages:
        return ""
    count = images_of(values, next((n for n in values["metrics"] if n.startswith("autoattack")), "accuracy"))
    clean = values["metrics"].get("accuracy", values["metrics"].get("standard_accuracy"))
    rows, before = [], round(clean * count) if clean is not None and count == images_of(values, "accuracy") else None
    for stage in stages:
        right = _still_right(stage, count)
        fooled = "" if before is None or right is None else f"{max(0, before - right):,} fooled"
        share = "" if right is None else f"{right:,}" + (f" of\u00a0{count:,}" if count else "")
        strip = bar(right / count) if right is not None and count else ""
        small = f"<small>{escape(fooled)}</small>" if fooled else ""
        name = str(stage.get("name", ""))
        rows.append(
            [
                f"{escape(name)}<small>{escape(STAGES.get(name, ''))}</small>",
                f"{escape(share)}{small}{strip}",
                escape(_seconds(stage.get("seconds"))),
                _large(stage.get("forwards")),
                _large(stage.get("backwards")),
            ]
        )
        before = right if right is not None else before
    note = "Each attack sees only the images that the ones before it could not fool. Passes count images, not batches."
    headings = ("attack", "still right", "time", "forward passes", "backward passes")
    return section(
        "AutoAttack, attack by attack", table(headings, rows, "Stages of AutoAttack"), paragraph(note, "note")
    )


def _still_right(stage: Mapping[str, Any], count: int | None) -> int | None:
    """Images that are right after a stage: counted flags, a count, or an accuracy."""
    for key in ("robust", "n_robust", "robust_count"):
        value = stage.get(key)
        if isinstance(value, int):
            return value
        if value is not None:
            return int(sum(bool(flag) for flag in value))
    return round(stage["accuracy"] * count) if stage.get("accuracy") is not None and count else None


def _corruptions(values: Mapping[str, Any]) -> str:
    """The heat map in numbers, and what a reader of it must know."""
    found = report_fields(values.get("corruptions"))
    rows = {name: {int(k): v for k, v in row.items()} for name, row in (found.get("table") or {}).items()}
    severities = sorted({severity for row in rows.values() for severity in row})
    if not severities:
        return ""
    cells = [
        [escape(name.replace("_", " ")), *(escape(percent(row[k])) if k in row else "" for k in severities)]
        for name, row in rows.items()
    ]
    title = str(found.get("name") or "Corruptions")
    shown = table(("corruption", *(f"severity {k}" for k in severities)), cells, "Accuracy under corruptions")
    notes = "".join(paragraph(note, "note") for note in found.get("notes") or [])
    return _folded(f"{title[:1].upper()}{title[1:]} in numbers", shown + notes)


def _classes(values: Mapping[str, Any]) -> str:
    """The bars in numbers."""
    found = report_fields(values.get("classes"))
    kinds, names = dict(found.get("accuracies") or {}), list(found.get("names") or [])
    if not kinds:
        return ""
    length = len(next(iter(kinds.values())))
    counts = found.get("counts") or [None] * length
    cells = [
        [
            escape(names[k] if k < len(names) else k),
            _large(counts[k]),
            *("" if column[k] is None else escape(percent(column[k])) for column in kinds.values()),
        ]
        for k in range(length)
    ]
    shown = table(
        ("class", "images", *(kind_title(kind, values.get("preset")) for kind in kinds)), cells, "Accuracy by class"
    )
    return _folded("Classes in numbers", shown)


def _folded(title: str, body: str) -> str:
    return section("", f"<details><summary>{escape(title)}</summary>\n{body}\n</details>") if body else ""


def _details(title: str, values: Any) -> str:
    entries = report_fields(values)
    shown = facts((str(name).replace("_", " "), written(value)) for name, value in entries.items())
    return _folded(title, shown)


def _run(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("n", "seed", "dtype", "batch_size", "seconds", "counts", "hardware", "versions", "commit", "command")
    return {name: values[name] for name in names if values.get(name) not in (None, "", {}, [])}


def _check(values: Mapping[str, Any]) -> None:
    metrics = values.get("metrics")
    if not metrics:
        raise ValueError("the report has no metrics: measure one first, such as metrics=('accuracy',)")
    for name, value in metrics.items():
        if name.endswith("accuracy") and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, accuracies are in [0, 1]: divide percent by 100")


def _of_metric(value: Any, name: str) -> str:
    value = value.get(name) if isinstance(value, Mapping) else value
    return "" if value is None else escape(value)


def _when(values: Mapping[str, Any]) -> str:
    split = report_fields(values.get("dataset")).get("split")
    return (f", split {split}" if split else "") + (f", {values['date']}" if values.get("date") else "")


def _caption(path: Path, values: Mapping[str, Any]) -> tuple[str, str]:
    """What a picture shows, for those who do not see it, and the text under it."""
    words = path.stem.replace("_", " ")
    alternative, caption = PICTURES.get(path.name, (f"Picture: {words}.", words[:1].upper() + words[1:]))
    remark = report_fields(values.get("curve")).get("remark") if path.name == "robustness_curve.png" else None
    return alternative, f"{caption} {remark}" if remark else caption


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _large(value: Any) -> str:
    return "" if value is None else f"{int(value):,}"
