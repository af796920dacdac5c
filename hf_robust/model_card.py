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

from huggingface_hub import EvalResult, ModelCardData

from .evaluation.report import EncoderReport, binomial_interval, describe_metric, write_text
from .model_card_texts import budget_text, cell, introduction, limits, norm_name, origin, usage

__all__ = ["model_card_data", "write_model_card"]

_TAGS = ("adversarial-robustness", "timm", "hf_robust")
_SELF_SUPERVISED_TAGS = ("contrastive-learning", "self-supervised-learning")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NAMED_CLASSES = 20
_PICTURES = (
    ("curves.png", "Loss terms, linear-probe accuracies and schedule over the training"),
    ("examples.png", "Images, the amplified change an attack makes, and the predictions before and after"),
    ("coreset.png", "The coresets: their classes, images, how often images were chosen, beside a random choice"),
)


def write_model_card(report: EncoderReport | Mapping[str, Any], directory: str | os.PathLike[str]) -> Path:
    """Write `README.md` of an encoder or a classifier from its report.

    Pictures (`curves.png`, `examples.png`, `coreset.png`) are shown when they lie in `directory`; when they lie in its
    parent they are copied first, so that the folder can be uploaded as it is.

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
    sections = (
        introduction(report),
        usage(report, directory),
        _threat_model(report),
        _results(report),
        _recipe(report),
        _coreset(report, directory),
        _pictures(report, directory),
        limits(report),
        _citation(report),
    )
    body = "\n\n".join(section for section in sections if section)
    return write_text(directory / "README.md", f"---\n{model_card_data(report).to_yaml()}\n---\n\n{body}\n")


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
    results = [entry for result in _own_results(report) for entry in _eval_results(result, report)]
    kind = ("supervised-learning",) if report.objective.get("supervised") else _SELF_SUPERVISED_TAGS
    return ModelCardData(
        library_name="peft" if report.exported_format == "peft" else "transformers",
        pipeline_tag="image-feature-extraction" if report.task == "encoder" else "image-classification",
        license=report.license,
        base_model=_hub_id(report.encoder),
        datasets=[hub_id] if hub_id else None,
        tags=[*_TAGS, *(kind if report.task == "encoder" else ()), *([objective] if objective else [])],
        model_name=report.name if results else None,
        eval_results=results or None,
    )


def _eval_results(result: dict[str, Any], report: EncoderReport) -> list[EvalResult]:
    dataset = result.get("dataset") or report.dataset
    name = dataset.get("name") or _hub_id(dataset)
    if not name:
        return []
    entries = []
    protocol = result.get("protocol")
    for key, value in result.get("metrics", {}).items():
        if value is None:
            continue
        words = describe_metric(key)
        arguments: dict[str, Any] = {k: words[k] for k in ("attack", "norm", "eps") if k in words}
        if "attack" in words:
            arguments |= {k: v for k, v in (result.get("attack") or {}).items() if k not in ("norm", "eps")}
        arguments |= {k: result[k] for k in ("n_train", "n_eval", "seed") if result.get(k) is not None}
        entries.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=_hub_id(dataset) or str(name),
                dataset_name=str(name),
                dataset_split=result.get("split") or (result.get("dataset") or {}).get("split"),
                metric_type="accuracy" if key.endswith("accuracy") else key,
                metric_name=f"{words['title']}, {protocol}" if protocol else words["title"],
                metric_value=value,
                metric_args=arguments or None,
            )
        )
    return entries


def _threat_model(report: EncoderReport) -> str:
    if not report.threat_model and report.task == "classifier":
        return "## Threat model\n\nNone of its own: the fine-tuning showed no attacked image, see the encoder's."
    if not report.threat_model:
        return "## Threat model\n\nNone: this encoder never saw an attacked image."
    return "## Threat model\n\nThe attack of the training (pixels in [0, 1]):\n\n" + _table(
        ("norm", "eps", "step size", "steps"), [_threat_row(report.threat_model)]
    )


def _threat_row(threat: dict[str, Any]) -> tuple[str, ...]:
    return (
        norm_name(threat.get("norm")),
        *(budget_text(threat.get(key)) for key in ("eps", "step_size")),
        cell(threat.get("steps")),
    )


def _results(report: EncoderReport) -> str:
    """One table per protocol, rows are metrics, columns are models, ours first and bold."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in sorted(report.results, key=lambda result: result.get("model") != report.name):
        dataset = (result.get("dataset") or report.dataset).get("name")
        key = (result.get("protocol"), dataset, result.get("n_train"), result.get("n_eval"), result.get("seed"))
        if any(value is not None for value in result.get("metrics", {}).values()):
            groups.setdefault(key, []).append(result)
    parts = [_results_table(report, key, results) for key, results in groups.items()]
    return "\n\n".join(["## Results", *parts]) if parts else ""


def _results_table(report: EncoderReport, key: tuple[Any, ...], results: list[dict[str, Any]]) -> str:
    protocol, dataset, n_train, n_eval, seed = key
    facts = [
        *([f"on {dataset}"] if dataset else []),
        *([f"fitted on {n_train} images"] if n_train is not None else []),
        *([f"judged on {n_eval} images"] if n_eval is not None else []),
        *([f"seed {seed}"] if seed is not None else []),
    ]
    title = ", ".join([(protocol or "results"), *facts])
    names = list(dict.fromkeys(metric for result in results for metric in result["metrics"]))
    names.sort(key=lambda name: name != "standard_accuracy")
    rows = []
    for name in names:
        values = [result["metrics"].get(name) for result in results]
        if any(value is not None for value in values):
            rows.append((describe_metric(name)["title"], *(_score(name, value, n_eval) for value in values)))
    models = [cell(result.get("model")) for result in results]
    header = [
        "metric",
        *(f"**{m}**" if r.get("model") == report.name else m for m, r in zip(models, results, strict=True)),
    ]
    interval = " In brackets: 95 % interval for the draw of the images." if n_eval else ""
    return f"{title[:1].upper()}{title[1:]}.{interval}\n\n{_table(header, rows)}"


def _score(name: str, value: float | None, n_eval: int | None) -> str:
    if value is None:
        return "\u2013"
    if not name.endswith("accuracy"):
        return f"{value:.4g}"
    if not n_eval:
        return f"{100 * value:.1f} %"
    low, high = binomial_interval(value, n_eval)
    return f"{100 * value:.1f} % ({100 * low:.1f}\u2013{100 * high:.1f})"


def _recipe(report: EncoderReport) -> str:
    training, dataset, objective = report.training, report.dataset, report.objective
    seconds = training.get("seconds")
    hardware = ", ".join(f"{key} {value}" for key, value in report.hardware.items())
    versions = ", ".join(f"{key} {value}" for key, value in report.versions.items())
    model_args = ", ".join(f"{key}={value}" for key, value in report.model_args.items())
    start = report.encoder
    rows = [
        ("encoder", origin(start) if start.get("name") else None),
        ("objective", objective.get("name")),
        *((f"objective: {key}", value) for key, value in (objective.get("parameters") or {}).items()),
        ("base", objective.get("base")),
        ("architecture", f"{report.architecture} ({model_args})" if model_args else report.architecture),
        ("image size", report.image_size),
        ("classes", _classes(report.label_names)),
        ("data set", dataset.get("name")),
        ("split", dataset.get("split")),
        ("images", dataset.get("n_images")),
        *((key.replace("_", " "), value) for key, value in training.items() if key != "seconds"),
        ("hours", None if seconds is None else f"{seconds / 3600:.2f}"),
        ("hardware", hardware or None),
        ("versions", versions or None),
        ("hf_robust", report.library_version),
        ("commit", report.commit),
        ("date", report.date),
    ]
    title = "Training recipe" if report.task == "encoder" else "Fine-tuning recipe"
    text = f"## {title}\n\n" + _table(("what", "value"), [(a, cell(b)) for a, b in rows if b is not None])
    return f"{text}\n\n{_fenced(report.command, 'bash')}" if report.command else text


def _classes(names: list[str]) -> str | None:
    if not names:
        return None
    more = f", ... ({len(names)})" if len(names) > _NAMED_CLASSES else ""
    return ", ".join(names[:_NAMED_CLASSES]) + more


def _coreset(report: EncoderReport, directory: Path) -> str:
    coreset = report.coreset
    if not coreset:
        return ""
    parameters = ", ".join(f"{key}={value}" for key, value in (coreset.get("parameters") or {}).items())
    method = f"{coreset.get('name')} ({parameters})" if parameters else coreset.get("name")
    images, pool, seconds = (coreset.get(key) for key in ("images", "pool_images", "training_seconds"))
    rows = [
        ("method", method),
        ("fraction asked for", _percent(coreset.get("fraction"))),
        ("fraction chosen", _percent(coreset.get("effective_fraction"))),
        ("images", images if pool is None else f"{images} of {pool}"),
        ("validation images, never trained on", coreset.get("validation_images") or None),
        ("selections", coreset.get("selections")),
        ("selection seconds", _seconds(coreset.get("selection_seconds"))),
        ("training seconds without selection", _seconds(seconds)),
    ]
    warmup = coreset.get("warmup_epochs")
    start = f"After {warmup:g} epoch{'s' * (warmup != 1)} on all images, the" if warmup else "The"
    text = f"## Coreset\n\n{start} training showed only a part of the images, chosen by {coreset.get('name')}.\n\n"
    text += _table(("what", "value"), [(a, cell(b)) for a, b in rows if b is not None])
    if any((directory / folder / "coreset.json").is_file() for folder in (".", "encoder")):
        text += (
            "\n\nThe images of the last selection are listed in `coreset.json`; `--coreset file:coreset.json` of "
            "`examples/pretrain.py` trains on them again."
        )
    return text


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.3g} %"


def _seconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.1f}"


def _pictures(report: EncoderReport, directory: Path) -> str:
    parts = []
    for name, caption in _PICTURES:
        if report.task == "classifier":
            caption = caption.replace("linear-probe accuracies", "validation accuracies")
        if not (directory / name).is_file() and (directory.parent / name).is_file():
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory.parent / name, directory / name)
        if (directory / name).is_file():
            parts.append(f"![{caption}]({name})")
    return "\n\n".join(["## Pictures", *parts]) if parts else ""


def _citation(report: EncoderReport) -> str:
    return f"## Citation\n\n{_fenced(report.citation.strip(), 'bibtex')}" if report.citation else ""


def _own_results(report: EncoderReport) -> list[dict[str, Any]]:
    return [result for result in report.results if result.get("model") == report.name]


def _hub_id(dataset: Mapping[str, Any]) -> str | None:
    hub_id = dataset.get("hub_id")
    if hub_id is not None and not _HUB_ID.fullmatch(str(hub_id)):
        raise ValueError(f"hub_id must be an id such as 'uoft-cs/cifar10', got {hub_id!r}: write None for local data")
    return hub_id


def _table(header: Any, rows: list[Any]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _fenced(text: str, language: str) -> str:
    # A fence longer than any run of backticks inside cannot be closed early.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
