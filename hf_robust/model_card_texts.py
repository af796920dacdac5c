"""The sections of a model card that are prose: what it is, how to load it, what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .evaluation.report import EncoderReport, describe_metric, format_eps

__all__ = ["budget_text", "cell", "introduction", "limits", "norm_name", "origin", "usage"]

_IMPORT = "import hf_robust  # registers the architecture"
_IMAGE = ["from PIL import Image"]
_OPEN = 'image = Image.open("photo.png").convert("RGB")'
_NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1"}
_PGD_LIMIT = {
    "encoder": (
        "- Linear-probe accuracy under PGD is an upper bound of the robust accuracy and not comparable with "
        "published AutoAttack numbers, which come from a stronger attack and another fine-tuning."
    ),
    "classifier": (
        "- Accuracy under PGD is an upper bound of the robust accuracy and not comparable with published AutoAttack "
        "numbers, which come from a stronger attack."
    ),
}


def introduction(report: EncoderReport) -> str:
    """What it is, what it was trained on, and whether it saw attacks.

    Args:
        report (`EncoderReport`): What is released.

    Returns:
        `str`: Markdown, heading included.
    """
    if report.task == "classifier":
        return _classifier_introduction(report)
    method, dataset = report.objective.get("name"), report.dataset.get("name")
    what = f"`{report.architecture}` image encoder"
    labels = "with labels" if report.objective.get("supervised") else "without labels"
    how = f" pre-trained {labels}{f' by {method}' if method else ''}{f' on {dataset}' if dataset else ''}"
    how += f", starting from {origin(report.encoder)}" if report.encoder.get("name") else ""
    if report.threat_model:
        why = "It was trained on attacked images, so that classifiers on its features resist small changes."
    else:
        why = "It was trained without an attack and is not robust: it is the contrast to encoders that are."
    return f"# {_title(report.name)}\n\n{_article(what)} {what}{how}. {why}"


def _classifier_introduction(report: EncoderReport) -> str:
    method, dataset, classes = report.objective.get("name"), report.dataset.get("name"), len(report.label_names)
    what = f"`{report.architecture}` image classifier" + (f" of {classes} classes" if classes else "")
    how = f" fine-tuned{f' by {method}' if method else ''}{f' on {dataset}' if dataset else ''}"
    start = f" from the encoder {origin(report.encoder)}" if report.encoder.get("name") else ""
    if report.threat_model:
        why = "It was fine-tuned on attacked images to resist small changes of the pixels."
    else:
        why = "The fine-tuning showed no attacked image: what it resists it owes to its encoder."
    text = f"# {_title(report.name)}\n\n{_article(what)} {what}{how}{start}. {why}"
    if report.exported_format == "peft":
        text += " This repository holds the adapter and the head; the weights of the encoder stay where they are."
    return text


def origin(encoder: Mapping[str, Any]) -> str:
    """The encoder that training started from, with how it was made where that is known.

    Args:
        encoder (`Mapping`): `name`, *optional* `objective` and `dataset`.

    Returns:
        `str`: Markdown.
    """
    known = [encoder.get("objective"), f"on {encoder['dataset']}" if encoder.get("dataset") else None]
    history = " ".join(str(part) for part in known if part)
    return f"`{encoder['name']}`" + (f" ({history})" if history else "")


def _article(words: str) -> str:
    return "An" if words.strip("`")[:1].lower() in "aeio" else "A"


def _title(name: str) -> str:
    return name.replace("\n", " ")


def usage(report: EncoderReport, directory: Path) -> str:
    """Every way to load an encoder, a classifier or an adapter, with what its input is.

    Args:
        report (`EncoderReport`): What is released.
        directory (`Path`): The folder of the card, asked for a ``native/`` subfolder when the report does not say.

    Returns:
        `str`: Markdown, heading included.
    """
    if report.exported_format == "peft":
        text = _adapter(report)
    elif report.exported_format == "timm_wrapper":
        text = f"Plain transformers, no remote code, nothing else to install:\n\n{_loading_code(report)}"
    else:
        text = (
            "Stock timm cannot build this architecture, so import `hf_robust` first:\n\n"
            f"{_loading_code(report, first=_IMPORT)}\n\n"
            "or let transformers run the code file of the repository:\n\n"
            f"{_loading_code(report, arguments=', trust_remote_code=True', processor='')}"
        )
        if _has_native(report, directory):
            native = _loading_code(report, arguments=', subfolder="native"')
            text += (
                "\n\nor take the exact re-expression on a stock architecture, without remote code; it has its own "
                f"image processor, use the two together:\n\n{native}"
            )
    notes = []
    if report.norm_branch:
        notes.append(f"The exported normalisation branch is `{report.norm_branch}`.")
    if report.image_size:
        notes.append(f"Images are {report.image_size} x {report.image_size} pixels; the image processor resizes them.")
    notes.append("Pixels are attacked in [0, 1], before the image processor normalises them.")
    return f"## Use\n\n{text}\n\n{' '.join(notes)}"


def _loading_code(report: EncoderReport, *, first: str = "", arguments: str = "", processor: str | None = None) -> str:
    where, processor = report.hub_id or "PATH_OR_REPO", arguments if processor is None else processor
    load_processor = f'processor = AutoImageProcessor.from_pretrained("{where}"{processor})'
    if report.task == "encoder":
        lines = [
            *_IMAGE,
            "from transformers import AutoImageProcessor, AutoModel",
            "",
            _OPEN,
            load_processor,
            f'encoder = AutoModel.from_pretrained("{where}"{arguments}).eval()',
            'features = encoder(**processor(image, return_tensors="pt")).pooler_output  # (N, D)',
        ]
    else:
        lines = [
            *_IMAGE,
            "from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline",
            "",
            _OPEN,
            load_processor,
            f'classifier = AutoModelForImageClassification.from_pretrained("{where}"{arguments}).eval()',
            'logits = classifier(**processor(image, return_tensors="pt")).logits  # (N, classes)',
            "",
            "# with the names of the classes",
            'classify = pipeline("image-classification", model=classifier, image_processor=processor)',
            "classify(image)",
        ]
    return _python([*([first] if first else []), *lines])


def _adapter(report: EncoderReport) -> str:
    where = report.hub_id or "PATH_OR_REPO"
    encoder = report.encoder.get("hub_id") or "PATH_OR_REPO_OF_THE_ENCODER"
    classes = str(len(report.label_names)) if report.label_names else "NUMBER_OF_CLASSES"
    lines = [
        *([] if report.encoder.get("exported_format") == "timm_wrapper" else [_IMPORT]),
        "from peft import PeftModel",
        *_IMAGE,
        "from transformers import AutoImageProcessor, AutoModelForImageClassification",
        "",
        _OPEN,
        f'processor = AutoImageProcessor.from_pretrained("{encoder}")',
        f'encoder = AutoModelForImageClassification.from_pretrained("{encoder}", num_labels={classes})',
        f'classifier = PeftModel.from_pretrained(encoder, "{where}").eval()',
        'logits = classifier(**processor(image, return_tensors="pt")).logits  # (N, classes)',
    ]
    return (
        f"The adapter belongs to the encoder `{report.encoder['name']}`, which is loaded first; transformers says "
        f"that its head is new, and the adapter then brings the trained one:\n\n{_python(lines)}"
    )


def _has_native(report: EncoderReport, directory: Path) -> bool:
    if report.native is not None:
        return report.native
    folders = ("native", f"{report.task}/native")
    return any((directory / folder / "config.json").is_file() for folder in folders)


def _python(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def limits(report: EncoderReport) -> str:
    """What the network cannot do and the numbers do not say.

    Args:
        report (`EncoderReport`): What is released.

    Returns:
        `str`: Markdown, heading included.
    """
    lines, classifier, measured = [], report.task == "classifier", _measured(report)
    if report.threat_model:
        norm, eps = norm_name(report.threat_model.get("norm")), report.threat_model.get("eps")
        budget = f"{norm} changes" + (f" up to {budget_text(eps)}" if eps is not None else "")
        lines.append(
            f"- Robust only against what it was trained and tested for: {budget}. Larger budgets, other norms, "
            f"rotations{' and patches' if _corrupted(measured) else ', patches or corruptions'} are another matter."
        )
    elif classifier:
        lines.append("- The fine-tuning used no attack: how robust it is depends on its encoder; measure it.")
    else:
        lines.append("- Not robust: do not use its features where somebody may change the input on purpose.")
    if any("pgd" in name for name in measured):
        lines.append(_PGD_LIMIT[report.task])
    if measured and not any(describe_metric(name).get("attack") == "autoattack" for name in measured):
        lines.append("- AutoAttack was not measured: the accuracy that a stronger attack leaves is not known.")
    if any(name.startswith("generated_corruptions") for name in measured):
        lines.append("- The corruptions were generated here; they are not the published CIFAR-10-C or 100-C files.")
    if report.results:
        lines.append("- The numbers hold for the data and the protocol named above, and for this one run.")
    if classifier:
        lines.append("- It names one of its classes for every image, also for images of none of them.")
        lines.append("- It inherits what the training images of the classifier and of its encoder show and leave out.")
    else:
        lines.append("- The encoder inherits what its training images show and leave out.")
    return "## Limits\n\n" + "\n".join(lines)


def _measured(report: EncoderReport) -> list[str]:
    """Names of the figures that are there, of the network itself."""
    found = (result.get("metrics") or {} for result in report.results if result.get("model") == report.name)
    return [name for metrics in found for name, value in metrics.items() if value is not None]


def _corrupted(measured: list[str]) -> bool:
    return any(name.startswith(("generated_corruptions", "cifar10c", "cifar100c")) for name in measured)


def norm_name(norm: Any) -> str:
    """A norm as papers write it.

    Args:
        norm (`Any`): `"linf"`, `"l2"`, `"l1"`; anything else stays as it is.

    Returns:
        `str`: For example `"L-inf"`.
    """
    return _NORMS.get(str(norm), cell(norm))


def budget_text(value: Any) -> str:
    """A budget or step size in pixels.

    Args:
        value (`Any`): A float; anything else stays as it is.

    Returns:
        `str`: For example `"8/255"`.
    """
    return format_eps(value) if isinstance(value, float) else cell(value)


def cell(value: Any) -> str:
    """A value as the cell of a table: one line, no bars, a dash for nothing.

    Args:
        value (`Any`): What stands there.

    Returns:
        `str`: Markdown.
    """
    if value is None:
        return "\u2013"
    return " ".join(str(value).split()).replace("|", "\\|")
