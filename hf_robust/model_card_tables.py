"""The sections of a model card that are tables: threat model, results, recipe, coreset. A missing value has no row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .evaluation.report import EncoderReport, binomial_interval, describe_metric
from .model_card_metadata import dataset_of, images_of, own_results
from .model_card_texts import budget_text, cell, norm_name, origin

__all__ = ["coreset", "fenced", "recipe", "results", "threat_model"]

_NAMED_CLASSES = 20
_WHITE_BOX = (
    "White box and untargeted: the attacker knows every weight and changes the pixels within the budget, so that the "
    "loss rises; no particular wrong answer is wanted."
)


def threat_model(report: EncoderReport) -> str:
    """What the training defended against, and what was tried against the result.

    Args:
        report (`EncoderReport`): What is released.

    Returns:
        `str`: Markdown, heading included.
    """
    tested = _attacks_tried(report)
    tried = f"Tested against {'; '.join(tested)}." if tested else "Not tested against any attack."
    if not report.threat_model and report.task == "classifier":
        text = "None of its own: the fine-tuning showed no attacked image, see the encoder's."
    elif not report.threat_model:
        text = "None: this encoder never saw an attacked image."
    else:
        row = (
            norm_name(report.threat_model.get("norm")),
            budget_text(report.threat_model.get("eps")),
            _step_lengths(report.threat_model),
            cell(report.threat_model.get("steps")),
        )
        text = "The attack of the training (PGD, pixels in [0, 1]):\n\n"
        text += f"{_table(('norm', 'eps', 'step size', 'steps'), [row])}\n\n"
        text += f"{_other_algorithm(report.threat_model)}{_WHITE_BOX}"
    return f"## Threat model\n\n{text}\n\n{tried}"


def _step_lengths(attack: dict[str, Any]) -> str:
    return ", ".join(map(budget_text, attack.get("step_sizes") or (attack.get("step_size"),)))


def _other_algorithm(attack: dict[str, Any]) -> str:
    """How the attack differs from the published one, if it does."""
    told = ["steps of different lengths"] if attack.get("step_sizes") else []
    told += [f"it stops below a gain of {100 * attack['min_gain']:g} % per step"] if attack.get("min_gain") else []
    told += ["an image's attack starts where its last one ended"] if attack.get("replay") else []
    return f"This is not the published training attack: {'; '.join(told)}.\n\n" if told else ""


def _attacks_tried(report: EncoderReport) -> list[str]:
    tried = []
    for result in own_results(report):
        for name, value in (result.get("metrics") or {}).items():
            words, protocol = describe_metric(name), result.get("protocol")
            if value is not None and "attack" in words:
                title = words["title"].replace(", accuracy", "").replace(" accuracy", "")
                tried.append(f"{title}, {protocol}" if protocol else title)
    return list(dict.fromkeys(tried))


def results(report: EncoderReport) -> str:
    """One table per protocol, data set and number of images; rows are metrics, columns models, ours first and bold.

    Args:
        report (`EncoderReport`): What is released.

    Returns:
        `str`: Markdown, heading included; empty without figures.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in sorted(report.results, key=lambda result: result.get("model") != report.name):
        dataset = dataset_of(result, report)
        where = (dataset.get("name") or dataset.get("hub_id"), dataset.get("split"))
        key = (result.get("protocol"), *where, *(result.get(name) for name in ("n_train", "n_eval", "seed")))
        if any(value is not None for value in result.get("metrics", {}).values()):
            groups.setdefault(key, []).append(result)
    parts = [_results_table(report, key, found) for key, found in groups.items()]
    return "\n\n".join(["## Results", *parts]) if parts else ""


def _results_table(report: EncoderReport, key: tuple[Any, ...], found: list[dict[str, Any]]) -> str:
    protocol, dataset, split, n_train, n_eval, seed = key
    title = str(protocol or "results")
    facts = [
        f"**{cell(title[:1].upper() + title[1:])}**",
        *([f"on {cell(dataset)}" + (f" (split {cell(split)})" if split else "")] if dataset else []),
        *([f"fitted on {n_train} images"] if n_train is not None else []),
        *([f"judged on {n_eval} images"] if n_eval is not None else []),
        *([f"seed {seed}"] if seed is not None else []),
    ]
    names = list(dict.fromkeys(metric for result in found for metric in result["metrics"]))
    names.sort(key=lambda name: name != "standard_accuracy")
    rows = []
    for name in names:
        values = [result["metrics"].get(name) for result in found]
        if any(value is not None for value in values):
            n = images_of(found[0], name)
            row = describe_metric(name)["title"] + (f", n = {n}" if n is not None and n != n_eval else "")
            rows.append((row, *(_score(name, result) for result in found)))
    models = [(cell(result.get("model")), result.get("model") == report.name) for result in found]
    header = ["metric", *(f"**{name}**" if ours else name for name, ours in models)]
    interval = " In brackets: 95 % interval for the draw of the images." if n_eval else ""
    parts = [f"{', '.join(facts)}.{interval}", _table(header, rows), *_remarks(found[0])]
    return "\n\n".join(parts)


def _score(name: str, result: dict[str, Any]) -> str:
    value, n = result["metrics"].get(name), images_of(result, name)
    if value is None:
        return "\u2013"
    if not name.endswith("accuracy"):
        return f"{value:.4g}"
    bounds = (result.get("intervals") or {}).get(name) or (binomial_interval(value, n) if n else None)
    return f"{100 * value:.1f} %" + (f" ({100 * bounds[0]:.1f}\u2013{100 * bounds[1]:.1f})" if bounds else "")


def _remarks(result: dict[str, Any]) -> list[str]:
    """How the figures of one table were measured, and what limits them."""
    attack, lines = result.get("attack") or {}, []
    details = [f"step {budget_text(attack['step_size'])}"] if attack.get("step_size") is not None else []
    details += ["random start"] if attack.get("random_start") else []
    details += [str(attack["loss"])] if attack.get("loss") else []
    details += [f"{attack['iterate']} iterate"] if attack.get("iterate") else []
    if details and any("pgd" in name for name in result["metrics"]):
        lines.append(f"PGD: {cell(', '.join(details))}.")
    if result.get("autoattack"):
        lines.append(f"AutoAttack's attacks, one after the other: {cell(', '.join(result['autoattack']).upper())}.")
    if result.get("corruptions"):
        lines.append(f"Corruptions: {cell(result['corruptions'])}.")
    measured = [f"at commit {cell(result['commit'])}"] if result.get("commit") else []
    measured += [f"on {cell(_hardware(result['hardware']))}"] if result.get("hardware") else []
    measured += [f"on {cell(result['date'])}"] if result.get("date") else []
    lines += [f"Measured {', '.join(measured)}."] if measured else []
    parts = [" ".join(lines)] if lines else []
    parts += [fenced(result["command"], "bash")] if result.get("command") else []
    return parts + [f"**Warning.** {cell(text)}" for text in result.get("warnings") or ()]


def _hardware(known: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in known.items())


def recipe(report: EncoderReport) -> str:
    """How it was made: method, data, training, hardware, versions, commit and command.

    Args:
        report (`EncoderReport`): What is released.

    Returns:
        `str`: Markdown, heading included.
    """
    training, dataset, objective = report.training, report.dataset, report.objective
    seconds = training.get("seconds")
    versions = ", ".join(f"{key} {value}" for key, value in report.versions.items())
    model_args = ", ".join(f"{key}={value}" for key, value in report.model_args.items())
    rows = [
        ("encoder", origin(report.encoder) if report.encoder.get("name") else None),
        ("objective", objective.get("name")),
        *((f"objective: {key}", value) for key, value in (objective.get("parameters") or {}).items()),
        ("base", objective.get("base")),
        ("architecture", f"{report.architecture} ({model_args})" if model_args else report.architecture),
        ("image size", report.image_size),
        ("classes", _classes(report.label_names)),
        ("data set", dataset.get("name")),
        ("split", dataset.get("split")),
        ("images", dataset.get("n_images")),
        *((key.replace("_", " "), _whole(value)) for key, value in training.items() if key != "seconds"),
        ("hours", None if seconds is None else f"{seconds / 3600:.2f}"),
        ("hardware", _hardware(report.hardware) or None),
        ("versions", versions or None),
        ("hf_robust", report.library_version),
        ("commit", report.commit),
        ("date", report.date),
    ]
    title = "Training recipe" if report.task == "encoder" else "Fine-tuning recipe"
    text = f"## {title}\n\n" + _table(("what", "value"), [(a, cell(b)) for a, b in rows if b is not None])
    return f"{text}\n\n{fenced(report.command, 'bash')}" if report.command else text


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _classes(names: list[str]) -> str | None:
    if not names:
        return None
    more = f", ... ({len(names)})" if len(names) > _NAMED_CLASSES else ""
    return ", ".join(names[:_NAMED_CLASSES]) + more


def coreset(report: EncoderReport, directory: Path) -> str:
    """Which part of the images the training showed, who chose it and what the choice cost.

    Args:
        report (`EncoderReport`): What is released.
        directory (`Path`): The folder of the card, asked for ``coreset.json``.

    Returns:
        `str`: Markdown, heading included; empty when all images were shown.
    """
    chosen = report.coreset
    if not chosen:
        return ""
    parameters = ", ".join(f"{key}={value}" for key, value in (chosen.get("parameters") or {}).items())
    method = f"{chosen.get('name')} ({parameters})" if parameters else chosen.get("name")
    images, pool, seconds = (chosen.get(key) for key in ("images", "pool_images", "training_seconds"))
    rows = [
        ("method", method),
        ("fraction asked for", _percent(chosen.get("fraction"))),
        ("fraction chosen", _percent(chosen.get("effective_fraction"))),
        ("images", images if pool is None else f"{images} of {pool}"),
        ("validation images, never trained on", chosen.get("validation_images") or None),
        ("selections", chosen.get("selections")),
        ("selection seconds", _seconds(chosen.get("selection_seconds"))),
        ("training seconds without selection", _seconds(seconds)),
    ]
    warmup = chosen.get("warmup_epochs")
    start = f"After {warmup:g} epoch{'s' * (warmup != 1)} on all images, the" if warmup else "The"
    text = f"## Coreset\n\n{start} training showed only a part of the images, chosen by {chosen.get('name')}.\n\n"
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


def _table(header: Any, rows: list[Any]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def fenced(text: str, language: str) -> str:
    """A block of code that its own content cannot close early.

    Args:
        text (`str`): The code.
        language (`str`): Such as `"bash"`.

    Returns:
        `str`: Markdown; the fence is longer than any run of backticks inside.
    """
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
