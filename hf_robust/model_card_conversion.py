"""The sections of a card for weights that others trained: where they come from, and what is not known about them."""

from __future__ import annotations

from .evaluation.report import EncoderReport
from .model_card_texts import cell

__all__ = ["conversion", "converted_introduction", "converted_limits", "converted_threat_model"]

_NAMED_CLASSES = 20


def converted_introduction(report: EncoderReport) -> str:
    """What it is, which file it comes from and whose it is.

    Args:
        report (`EncoderReport`): With `converted_from`.

    Returns:
        `str`: Markdown, heading included.
    """
    start, classes = report.converted_from, len(report.label_names)
    what = f"Image {report.task} `{report.architecture}`" + (f" of {classes} classes" if classes else "")
    branch = f" (norm branch `{report.norm_branch}`)" if report.norm_branch else ""
    title = report.name.replace("\n", " ")
    return (
        f"# {title}\n\n{what}, converted with hf_robust from the file `{cell(start.get('file'))}`{branch}. The "
        "weights come from that file and are the work of its authors: what they were trained on and how, and under "
        "which licence they may be used and published, is theirs to say. Ask them before you publish a copy, and cite "
        f"them. Files like this are written by the code of {cell(start.get('source'))}."
    )


def conversion(report: EncoderReport) -> str:
    """The file, how it was read, and what the conversion left out or assumed.

    Args:
        report (`EncoderReport`): With `converted_from`.

    Returns:
        `str`: Markdown, heading included.
    """
    start, args = report.converted_from, ", ".join(f"{key}={value}" for key, value in report.model_args.items())
    names = report.label_names
    rows = [
        *((key, start.get(key)) for key in ("file", "sha256", "format", "branch")),
        ("architecture", f"{report.architecture} ({args})" if args else report.architecture),
        ("image size", report.image_size),
        ("classes", ", ".join(names[:_NAMED_CLASSES]) + (" ..." if len(names) > _NAMED_CLASSES else "") or None),
        ("versions", ", ".join(f"{key} {value}" for key, value in report.versions.items()) or None),
        ("hf_robust", report.library_version),
        ("commit", report.commit),
        ("date", report.date),
    ]
    lines = ["| what | value |", "| --- | --- |"]
    lines += [f"| {key} | {cell(value)} |" for key, value in rows if value is not None]
    notes = [f"- {cell(note)}" for note in start.get("notes") or ()]
    return "## Conversion\n\n" + "\n".join([*lines, *([""] if notes else []), *notes])


def converted_threat_model(report: EncoderReport) -> str:
    """That the file does not name the attack of its training.

    Args:
        report (`EncoderReport`): With `converted_from`.

    Returns:
        `str`: Markdown, heading included.
    """
    tested = "what was measured here stands below" if report.results else "nothing was measured here"
    return f"## Threat model\n\nThe converted file does not say against what it was trained, and {tested}."


def converted_limits(report: EncoderReport) -> str:
    """What is not known, and what the numbers do not say.

    Args:
        report (`EncoderReport`): With `converted_from`.

    Returns:
        `str`: Markdown, heading included.
    """
    lines = [
        "- How robust it is has to be measured (`hf-robust evaluate`); published numbers of its authors hold for "
        "their own evaluation."
    ]
    if any("pgd" in name for result in report.results for name in result.get("metrics", {})):
        lines.append("- Accuracy under PGD is an upper bound of the robust accuracy.")
    if report.results:
        lines.append("- The numbers hold for the data and the protocol named above.")
    if report.task == "classifier":
        lines.append("- It names one of its classes for every image, also for images of none of them.")
    lines.append("- It inherits what the images of its training show and leave out.")
    return "## Limits\n\n" + "\n".join(lines)
