"""The model card of one encoder or classifier, written from its report and from nothing else.

A number the report does not hold has no row in the card. Nothing here talks to a network.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .evaluation.report import EncoderReport, write_text
from .model_card_citations import bibtex
from .model_card_conversion import conversion, converted_introduction, converted_limits, converted_threat_model
from .model_card_metadata import model_card_data, own_results, write_eval_results
from .model_card_tables import coreset, fenced, recipe, results, threat_model
from .model_card_texts import introduction, limits, usage

__all__ = ["CARD_FILE", "copy_evaluation_pictures", "model_card_text", "write_model_card"]

CARD_FILE = "README.md"
_PICTURES = {
    "curves.png": "Loss terms, linear-probe accuracies and schedule over the training",
    "examples.png": "Images, the amplified change an attack makes, and the predictions before and after",
    "coreset.png": "The coresets: their classes, images, how often images were chosen, beside a random choice",
}
_OF_EVALUATION = {
    "robustness_curve.png": "Accuracy under PGD of growing budgets, with 95 % intervals",
    "corruptions.png": "Accuracy under each corruption at each severity",
    "classes.png": "Accuracy of each class, on clean and on attacked images",
    "examples.png": "Judged images, the amplified change that PGD makes, and the predictions before and after",
}


def write_model_card(report: EncoderReport | Mapping[str, Any], directory: str | os.PathLike[str]) -> Path:
    """Write `README.md` of an encoder or a classifier from its report, and the files of `.eval_results/`.

    Pictures (`curves.png`, `examples.png`, `coreset.png`) are shown when they lie in `directory`; when they lie in its
    parent they are copied first, so that the folder can be uploaded as it is. Those of an evaluation are the ones
    that its entry of the report names, see [`copy_evaluation_pictures`].

    Args:
        report (`EncoderReport` or `Mapping`): what is known about the encoder.
        directory (`str` or `PathLike`): the folder that will hold the card; made when missing.

    Returns:
        `Path`: the card.

    Raises:
        ValueError: if the report does not fit its schema, or a data set's `hub_id` cannot be one.
    """
    report = report if isinstance(report, EncoderReport) else EncoderReport.from_dict(report)
    directory = Path(directory)
    model_card_data(report)  # refuses what cannot be published before anything is written
    for name in _PICTURES:
        if not (directory / name).is_file() and (directory.parent / name).is_file():
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory.parent / name, directory / name)
    write_eval_results(report, directory)
    return write_text(directory / CARD_FILE, model_card_text(report, directory))


def model_card_text(report: EncoderReport, directory: str | os.PathLike[str]) -> str:
    """The card as text; the same report and folder give the same bytes.

    Args:
        report (`EncoderReport`): what is known about the encoder.
        directory (`str` or `PathLike`): the folder of the card, asked which pictures, `native/` and `coreset.json`
            there are; nothing is written.

    Returns:
        `str`: metadata block and Markdown.
    """
    directory = Path(directory)
    citations, converted = bibtex(report), bool(report.converted_from)
    sections = (
        (converted_introduction if converted else introduction)(report),
        usage(report, directory),
        (converted_threat_model if converted else threat_model)(report),
        results(report),
        (conversion if converted else recipe)(report),
        coreset(report, directory),
        _pictures(report, directory),
        (converted_limits if converted else limits)(report),
        f"## Citation\n\n{fenced(citations, 'bibtex')}" if citations else "",
    )
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{model_card_data(report).to_yaml()}\n---\n\n{body}\n"


def copy_evaluation_pictures(
    result: Mapping[str, Any], source: str | os.PathLike[str], directory: str | os.PathLike[str]
) -> dict[str, Any]:
    """Put the pictures of an evaluation beside a card.

    Args:
        result (`Mapping`): entry of the report's `results`; its protocol, data set, number of images and seed name
            the files, so that those of several evaluations stand side by side.
        source (`str` or `PathLike`): folder of the evaluation.
        directory (`str` or `PathLike`): folder of the card.

    Returns:
        `dict`: the entry with `pictures`, the names of the copies; without, when there was nothing to copy.
    """
    facts = [result.get("protocol"), (result.get("dataset") or {}).get("name"), f"n{result.get('n_eval')}"]
    title = re.sub(r"[^a-z0-9]+", "-", " ".join(str(fact) for fact in [*facts, f"seed{result.get('seed')}"]).lower())
    names = []
    for name in _OF_EVALUATION:
        copy = f"{title.strip('-')}_{name}"
        (Path(directory) / copy).unlink(missing_ok=True)  # an earlier evaluation may have drawn more
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(directory) / copy)
            names.append(copy)
    others = {key: value for key, value in result.items() if key != "pictures"}
    return {**others, "pictures": names} if names else others


def _pictures(report: EncoderReport, directory: Path) -> str:
    parts = []
    for name, caption in _PICTURES.items():
        if report.task == "classifier":
            caption = caption.replace("linear-probe accuracies", "validation accuracies")
        if (directory / name).is_file():
            parts.append(_picture(name, f"{caption}."))
    for result in own_results(report):
        facts = [result.get("protocol"), (result.get("dataset") or {}).get("name")]
        where = ", ".join(str(fact) for fact in facts if fact)
        for name in result.get("pictures") or ():
            meaning = _OF_EVALUATION.get(name.split("_", 1)[-1])
            if meaning and Path(name).name == name and (directory / name).is_file():
                parts.append(_picture(name, f"{meaning} ({where})." if where else f"{meaning}."))
    return "\n\n".join(["## Pictures", *parts]) if parts else ""


def _picture(name: str, caption: str) -> str:
    return f"![{caption}]({name})\n\n*{caption}*"
