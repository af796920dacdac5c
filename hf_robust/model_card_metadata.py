"""What machines read of a model card: its metadata block and the files of `.eval_results/`.

Only figures of the network itself go there; its contrasts stand in the tables alone. Accuracies stay fractions in
[0, 1], and every figure carries its attack, its number of images and its seed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from .evaluation.report import EncoderReport, describe_metric, format_eps, write_text

__all__ = [
    "dataset_of",
    "eval_result_files",
    "images_of",
    "model_card_data",
    "own_results",
    "write_eval_results",
]

EVAL_FOLDER = ".eval_results"
_OURS = "# Written by hf_robust from report.json, beside the model card; do not edit.\n"
_TAGS = ("adversarial-robustness", "timm", "hf_robust")
_SELF_SUPERVISED_TAGS = ("contrastive-learning", "self-supervised-learning")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_card_data(report: EncoderReport) -> ModelCardData:
    """Build the metadata block of the card: tags, data set and this encoder's results.

    Args:
        report (`EncoderReport`): what is known about the encoder.

    Returns:
        `ModelCardData`: accuracies stay fractions in [0, 1], with metric names that carry the attack.

    Raises:
        ValueError: if a data set's `hub_id` cannot be a repository id.
    """
    hub_id = _hub_id(report.dataset)
    objective = re.sub(r"[^a-z0-9]+", "-", str(report.objective.get("name") or "").lower()).strip("-")
    results = [_eval_result(report, *figure) for figure in _figures(report)]
    kind: tuple[str, ...] = ("supervised-learning",) if report.objective.get("supervised") else _SELF_SUPERVISED_TAGS
    if report.task != "encoder" or report.converted_from:  # how others trained it is not in their file
        kind = ()
    adapter, base = report.exported_format == "peft", _hub_id(report.encoder)
    relation: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if base else {}
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-feature-extraction" if report.task == "encoder" else "image-classification",
        license=report.license,
        base_model=base,
        datasets=[hub_id] if hub_id else None,
        tags=[*_TAGS, *kind, *([objective] if objective else [])],
        model_name=report.name if results else None,
        eval_results=results or None,
        **relation,
    )


def eval_result_files(report: EncoderReport) -> dict[str, str]:
    """The files of `.eval_results/`: one per data set of the Hub that this network was measured on.

    Args:
        report (`EncoderReport`): what is known about the network; figures on data without a Hub id have no entry.

    Returns:
        `dict[str, str]`: file name to YAML.

    Raises:
        ValueError: if a data set's `hub_id` cannot be a repository id.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for result, key, value in _figures(report):
        dataset = dataset_of(result, report)
        hub_id = _hub_id(dataset)
        if not hub_id:
            continue
        notes = [describe_metric(key)["title"], result.get("protocol"), _named(dataset, "split")]
        notes += [_named({"n": images_of(result, key)}, "n"), _named(result, "seed")]
        entry = EvalResultEntry(
            dataset_id=hub_id,
            task_id=key,
            value=value,
            date=result.get("date"),
            notes=", ".join(str(note) for note in notes if note),
        )
        entries.setdefault(f"{hub_id.replace('/', '--')}.yaml", []).append(entry)
    return {
        name: _OURS
        + yaml.safe_dump(eval_result_entries_to_yaml(found), sort_keys=False, allow_unicode=True, width=1000)
        for name, found in entries.items()
    }


def write_eval_results(report: EncoderReport, directory: str | os.PathLike[str]) -> list[Path]:
    """Write the files of `.eval_results/`; those of an earlier report that no longer hold go, foreign ones stay.

    Args:
        report (`EncoderReport`): what is known about the network.
        directory (`str` or `PathLike`): the folder of the card.

    Returns:
        `list[Path]`: what was written.
    """
    folder, files = Path(directory) / EVAL_FOLDER, eval_result_files(report)
    for path in folder.glob("*.yaml"):
        if path.name not in files and path.read_text(encoding="utf-8").startswith(_OURS):
            path.unlink()
    return [write_text(folder / name, text) for name, text in files.items()]


def own_results(report: EncoderReport) -> list[dict[str, Any]]:
    """Results of the network itself, not of its contrasts.

    Args:
        report (`EncoderReport`): what is known about the network.
    """
    return [result for result in report.results if result.get("model") == report.name]


def dataset_of(result: Mapping[str, Any], report: EncoderReport) -> dict[str, Any]:
    """What a result was measured on: `name`, *optional* `split` and `hub_id`.

    Args:
        result (`Mapping`): an entry of the report's `results`.
        report (`EncoderReport`): gives the Hub id when the network was trained on the same data set.
    """
    own = dict(result.get("dataset") or {})
    trained = {key: report.dataset.get(key) for key in ("name", "hub_id")}
    if not own or (own.get("name") == trained["name"] and not own.get("hub_id")):
        own = {**own, **trained}  # the split of the training is not the one of the measurement
    split = result.get("split") or own.get("split")
    return {**{key: value for key, value in own.items() if value}, **({"split": split} if split else {})}


def images_of(result: Mapping[str, Any], metric: str) -> int | None:
    """How many images a figure was measured on.

    Args:
        result (`Mapping`): an entry of a report's `results`.
        metric (`str`): name of the figure; the entry may say another number for it than for the rest.
    """
    return (result.get("n_of") or {}).get(metric, result.get("n_eval"))


def _figures(report: EncoderReport) -> Iterator[tuple[dict[str, Any], str, float]]:
    for result in own_results(report):
        dataset = dataset_of(result, report)
        for key, value in (result.get("metrics") or {}).items():
            if value is not None and (dataset.get("name") or dataset.get("hub_id")):
                yield result, key, value


def _eval_result(report: EncoderReport, result: dict[str, Any], key: str, value: float) -> EvalResult:
    dataset, words, protocol = dataset_of(result, report), describe_metric(key), result.get("protocol")
    arguments: dict[str, Any] = {name: words[name] for name in ("attack", "norm", "eps") if name in words}
    if str(words.get("attack", "")).startswith("pgd"):  # how PGD was run; other attacks choose their own steps
        extra = (result.get("attack") or {}).items()
        arguments |= {name: v for name, v in extra if name not in ("norm", "eps") and v is not None}
        if isinstance(arguments.get("step_size"), float):
            arguments["step_size"] = format_eps(arguments["step_size"])
    if words.get("attack") == "autoattack" and result.get("autoattack"):
        arguments["attacks"] = list(result["autoattack"])
    facts = {"n_train": result.get("n_train"), "n_eval": images_of(result, key), "seed": result.get("seed")}
    arguments |= {name: fact for name, fact in facts.items() if fact is not None}
    return EvalResult(
        task_type="image-classification",
        dataset_type=_hub_id(dataset) or str(dataset["name"]),
        dataset_name=str(dataset.get("name") or dataset["hub_id"]),
        dataset_split=dataset.get("split"),
        metric_type="accuracy" if key.endswith("accuracy") else key,
        metric_name=f"{words['title']}, {protocol}" if protocol else words["title"],
        metric_value=value,
        metric_args=arguments or None,
    )


def _named(values: Mapping[str, Any], key: str) -> str | None:
    return None if values.get(key) is None else f"{key} {values[key]}"


def _hub_id(dataset: Mapping[str, Any]) -> str | None:
    hub_id = dataset.get("hub_id")
    if hub_id is not None and not _HUB_ID.fullmatch(str(hub_id)):
        raise ValueError(f"hub_id must be an id such as 'uoft-cs/cifar10', got {hub_id!r}: write None for local data")
    return hub_id
