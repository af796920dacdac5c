"""What is known about one released encoder or classifier, as data: metric names, the report schema, its JSON file."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .environment import redact

__all__ = ["EncoderReport", "attack_metric_name", "binomial_interval", "describe_metric", "format_eps", "write_text"]

REPORT_FILE = "report.json"
EXPORTED_FORMATS = ("timm_wrapper", "hf_robust_timm", "peft")
TASKS = ("encoder", "classifier")
_CASCADES = {  # only the whole one may be called AutoAttack
    "autoattack": "AutoAttack",
    "autoattackfast": "AutoAttack's two APGD attacks,",
    "autoattacksmoke": "AutoAttack cut short,",
}
_NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1"}
_SPELLED = {"cifar10c": "CIFAR-10-C", "cifar100c": "CIFAR-100-C"}
_ATTACK_METRIC = re.compile(r"(?P<attack>[a-z0-9]+)_(?P<norm>linf|l2|l1)_(?P<eps>\d+_255|[0-9.e-]+)_accuracy")


def format_eps(eps: float) -> str:
    """Write a pixel budget the way papers do.

    Args:
        eps (`float`): budget in pixels of [0, 1] (for `norm="l2"` of one whole image).

    Returns:
        `str`: a short decimal when the number is one (`"0.5"`), otherwise the number of grey levels over 255
        (`"8/255"`), otherwise the decimal that reads back as the same float.
    """
    levels = round(eps * 255)
    if len(repr(float(eps))) > 5 and levels > 0 and math.isclose(levels / 255, eps, rel_tol=1e-6):
        return f"{levels}/255"
    return f"{eps!r}".removesuffix(".0")


def attack_metric_name(attack: str, norm: str, eps: float) -> str:
    """Name an accuracy under attack so that nobody can mistake it for another.

    Args:
        attack (`str`): the attack with its steps, lower case letters and digits: `"pgd20"`, `"autoattack"`.
        norm (`str`): `"linf"`, `"l2"` or `"l1"`.
        eps (`float`): budget in pixels of [0, 1].

    Returns:
        `str`: for example `"pgd20_linf_8_255_accuracy"`.

    Raises:
        ValueError: for an attack name with other characters or an unknown norm.
    """
    name = f"{attack}_{norm}_{format_eps(eps).replace('/', '_')}_accuracy"
    if not _ATTACK_METRIC.fullmatch(name):
        raise ValueError(
            f"got attack {attack!r} with norm {norm!r}; the attack is lower case letters and digits, the norm one of "
            f"{', '.join(_NORMS)}: write for example attack_metric_name('pgd20', 'linf', 8 / 255)"
        )
    return name


def describe_metric(name: str) -> dict[str, str]:
    """Read a metric name back into words.

    Args:
        name (`str`): a key such as `"standard_accuracy"` or `"pgd20_linf_8_255_accuracy"`.

    Returns:
        `dict`: `title` for people; for an accuracy under attack also `attack`, `norm` and `eps`, for machines.
    """
    match = _ATTACK_METRIC.fullmatch(name)
    if match is None:
        first, *words = name.split("_")
        return {"title": " ".join([_SPELLED.get(first, first[:1].upper() + first[1:]), *words])}
    eps = match["eps"].replace("_", "/")
    attack = _CASCADES.get(match["attack"]) or re.sub(r"(?<=\D)(?=\d)", "-", match["attack"]).upper()
    title = f"{attack} accuracy ({_NORMS[match['norm']]}, eps {eps})"
    return {"title": title, "attack": match["attack"], "norm": match["norm"], "eps": eps}


def binomial_interval(accuracy: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of an accuracy measured on `n` images.

    Args:
        accuracy (`float`): fraction of right answers, in [0, 1].
        n (`int`): number of images it was counted on, at least 1.

    Returns:
        `tuple[float, float]`: lower and upper bound, in [0, 1]; it says how far another draw of images may move
        the number, not another seed of the training.
    """
    z2 = 1.959964**2
    centre = (accuracy + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (accuracy * (1 - accuracy) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def write_text(path: Path, text: str) -> Path:
    """Write a text file so that a reader sees the old content or the new one, never half of it.

    Args:
        path (`Path`): the file; its folder is made when missing.
        text (`str`): the content, written as UTF-8.

    Returns:
        `Path`: the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@dataclass
class EncoderReport:
    """Everything the model card of one encoder, or of a classifier made from one, may say; no more is said.

    Values are plain Python after construction (tensors and NumPy scalars become numbers, paths and tuples become
    strings and lists), with access tokens and home folders removed from every text.

    Args:
        name (`str`): its name in tables; a Hub id when it has one.
        architecture (`str`): timm architecture, e.g. `"resnet18_cifar"`.
        exported_format (`str`): `"timm_wrapper"` (stock timm can build it), `"hf_robust_timm"`, or `"peft"` for an
            adapter that needs the encoder it was trained on.
        objective (`dict`): `name`, `parameters` (`dict`), *optional* `base` (the schedule or method it builds on),
            `supervised` (`bool`; default: trained without labels).
        model_args (`dict`): arguments of the architecture.
        image_size (`int`, *optional*): side of the input in pixels.
        norm_branch (`str`, *optional*): the norm branch that was exported, `"adv"` or `"clean"`.
        native (`bool`, *optional*): whether a `native/` subfolder for stock timm exists; `None`: look in the folder.
        hub_id (`str`, *optional*): the encoder's repository on the Hub, used in the loading example.
        dataset (`dict`): of the pre-training: `name`, `split`, `n_images`, `hub_id`.
        threat_model (`dict`, *optional*): of the pre-training: `norm`, `eps` (pixels of [0, 1]), `step_size`,
            `steps`; `None` for an encoder that was trained without an attack.
        training (`dict`): `epochs`, `steps`, `batch_size`, `optimizer`, `learning_rate`, `precision`, `seed`,
            `seconds`, `processes`.
        coreset (`dict`, *optional*): of a training that did not show all images all the time: `name`, `parameters` of
            the method that chose them, `fraction` (asked for) and `effective_fraction`, `images` chosen of
            `pool_images`, `validation_images` set apart, `warmup_epochs` on all images, `selections`,
            `selection_seconds`, and `training_seconds` without these.
        results (`list[dict]`): one entry per model and protocol: `model`, `metrics` (accuracies in [0, 1], names of
            `attack_metric_name`), `protocol`, `n_train`, `n_eval`, `seed`; *optional* `attack`, `dataset`, `split`,
            `n_of` (images of single metrics, where they differ), `intervals`, `autoattack` (names of its attacks),
            `corruptions` (what they are), `warnings`, `pictures`, and `command`, `commit`, `date` of a measurement
            that was not part of the training run.
            The entry whose `model` equals `name` is this encoder's, the others are its contrast.
        command (`str`, *optional*): the command line that made it.
        commit (`str`, *optional*): commit of the hf_robust source tree.
        hardware (`dict`): of `collect_environment`.
        versions (`dict`): of `collect_environment`.
        library_version (`str`, *optional*): version of hf_robust.
        date (`str`, *optional*): ISO date of the export.
        citation (`str`, *optional*): BibTeX of the method.
        license (`str`, *optional*): licence identifier of the weights.
        task (`str`): `"encoder"` (the default) or `"classifier"`; for a classifier `objective`, `dataset`,
            `threat_model`, `training` and `results` are those of the fine-tuning.
        encoder (`dict`): what it started from: `name`, *optional* `hub_id`, `objective` (name of the method),
            `dataset` (its name), `exported_format`.
        label_names (`list[str]`): of a classifier, one name per class in the order of the outputs.
        converted_from (`dict`): of weights that others trained and published: `format`, `file` (its name), `sha256`,
            `branch`, `source` (the repository whose code writes such files), `notes` (`list[str]`).

    Raises:
        ValueError: for an unknown `exported_format` or `task`, an adapter without its encoder, an accuracy outside
            [0, 1] or a number that is not finite.
    """

    name: str
    architecture: str
    exported_format: str
    objective: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    norm_branch: str | None = None
    native: bool | None = None
    hub_id: str | None = None
    dataset: dict[str, Any] = field(default_factory=dict)
    threat_model: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    coreset: dict[str, Any] | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    command: str | None = None
    commit: str | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    library_version: str | None = None
    date: str | None = None
    citation: str | None = None
    license: str | None = None
    task: str = "encoder"
    encoder: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)
    converted_from: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry in fields(self):
            setattr(self, entry.name, _plain(getattr(self, entry.name), entry.name))
        if self.exported_format not in EXPORTED_FORMATS:
            raise ValueError(
                f"exported_format must be one of {', '.join(EXPORTED_FORMATS)}, got {self.exported_format!r}: "
                "it is the model_type in the encoder's config.json, or peft for an adapter"
            )
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}: say what the weights are")
        if self.exported_format == "peft" and (self.task != "classifier" or not self.encoder.get("name")):
            raise ValueError(
                f"an adapter (exported_format 'peft') is a classifier on an encoder, got task={self.task!r} and "
                f"encoder={self.encoder!r}: write task='classifier' and encoder={{'name': ...}}"
            )
        for result in self.results:
            _check_result(result)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderReport:
        """Build a report from a mapping, refusing what the schema does not know.

        Args:
            values (`Mapping`): field names to values.

        Returns:
            `EncoderReport`: the report.

        Raises:
            ValueError: for an unknown field, or when `name`, `architecture` or `exported_format` is missing.
        """
        known = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}"
                raise ValueError(f"got the field {key!r}, which a report does not have: {hint}")
        missing = [key for key in ("name", "architecture", "exported_format") if values.get(key) is None]
        if missing:
            raise ValueError(
                f"the report has {sorted(values)} but no {', '.join(missing)}: an encoder is not identified without; "
                "add the missing fields"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain Python, ready for JSON.

        Returns:
            `dict`: every field, missing ones as `None` or empty.
        """
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON; floats read back bit for bit.

        Args:
            path (`str` or `PathLike`): a `.json` file, or a folder that will hold `report.json`.

        Returns:
            `Path`: the file written.
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return write_text(_report_file(path), text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncoderReport:
        """Read a report written by `save`.

        Args:
            path (`str` or `PathLike`): the `.json` file or its folder.

        Returns:
            `EncoderReport`: equal to the one that was saved.

        Raises:
            ValueError: if the file is not a report.
        """
        file = _report_file(path)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file} is not JSON ({error}); a report is written by EncoderReport.save: restore the file"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} holds a {type(values).__name__}, a report is an object: restore the file")
        return cls.from_dict(values)


def _report_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / REPORT_FILE


def _plain(value: Any, where: str) -> Any:
    """Turn a value into what JSON gives back, so that a saved report equals the loaded one."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str | os.PathLike):
        return redact(os.fspath(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, a report holds finite numbers only: leave it out if it is unknown")
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(items)]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    return redact(str(value))


def _check_result(result: dict[str, Any]) -> None:
    for key, value in result.get("metrics", {}).items():
        if key.endswith("accuracy") and value is not None and not 0 <= value <= 1:
            raise ValueError(f"{key} of {result.get('model')!r} must be in [0, 1], got {value}: divide percent by 100")
