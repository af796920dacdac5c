"""What an evaluation of robustness found, as data: figures with their intervals, flags of every image, provenance."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .environment import redact
from .report import binomial_interval, describe_metric, write_text
from .report_texts import metric_title

__all__ = ["EvaluationReport"]

REPORT_FILE, FLAGS_FILE = "report.json", "flags.npz"
_KIND = "robustness"  # so that nobody takes the file for the report of a training


@dataclass
class EvaluationReport:
    """Figures of one classifier on one data set, with everything needed to check and to repeat them.

    Args:
        metrics (`dict[str, float]`): accuracies in [0, 1]; the names carry attack, norm and budget, such as
            `pgd20_linf_8_255_accuracy`; `accuracy` is that on clean images.
        n (`int`): images that were judged.
        eps (`float`): budget of the attacks, pixels in [0, 1].
        norm (`str`): `"linf"`, `"l2"` or `"l1"`.
        preset (`str`): of AutoAttack: `"standard"`, `"fast"` or `"smoke"`.
        seed (`int`): of the choice of images and of the attacks.
        batch_size (`int`): random starts and AutoAttack's draws depend on it.
        dtype (`str`): of the arithmetic.
        intervals (`dict[str, list[float]]`): 95 % Wilson interval of each accuracy, for the draw of the images.
        stages (`list[dict]`): attacks of AutoAttack in order: `name`, `robust` (images still right), `accuracy`,
            `seconds`, `forwards`, `backwards`.
        curve (`dict`): PGD over growing budgets: `points` (list of `[eps, accuracy]`), `n`, `steps`, `remark`.
        corruptions (`dict`): `table` (name to accuracies by severity), `mean`, `published`, `name`, `n`, `notes`.
        classes (`dict`): per class: `names`, `counts`, and under `accuracies` one list per kind of image (clean and
            each attack), `None` for a class without images.
        counts (`dict[str, dict[str, int]]`): images classified and differentiated, per part: `forwards`, `backwards`.
        seconds (`dict[str, float]`): per part.
        warnings (`list[str]`): what limits the figures, as sentences.
        model (`dict`): what was evaluated.
        dataset (`dict`): on what: `name`, `split`, `n`, `n_total`, `image_size`, ...
        leaderboard (`dict`, *optional*): the published row of the same method, see [`LeaderboardRow`].
        versions (`dict[str, str]`), hardware (`dict`), library_version (`str`), commit (`str`, *optional*), command
            (`str`, *optional*), date (`str`): provenance.
        flags (`dict[str, torch.Tensor]`): per image: `index` in the data set, `label`, `prediction`, and for every
            kind (`clean`, `pgd20`, `autoattack`, ...) whether the image was classified rightly.
    """

    metrics: dict[str, float]
    n: int
    eps: float = 8 / 255
    norm: str = "linf"
    preset: str = "standard"
    seed: int = 0
    batch_size: int = 128
    dtype: str = "float32"
    intervals: dict[str, list[float]] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    curve: dict[str, Any] = field(default_factory=dict)
    corruptions: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    leaderboard: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    library_version: str | None = None
    commit: str | None = None
    command: str | None = None
    date: str | None = None
    flags: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if name.endswith("accuracy") and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}: divide percent by 100")
            if name.endswith("accuracy") and name not in self.intervals and self.n:
                self.intervals[name] = list(binomial_interval(value, self.n))

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain Python, without the flags of single images.

        Returns:
            `dict`: what `report.json` holds; texts without tokens and home folders.
        """
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "flags"}
        return {"kind": _KIND, **_redacted(values)}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `report.json` and, where there are flags, `flags.npz`.

        Args:
            folder (`str` or `PathLike`): made when missing.

        Returns:
            `Path`: of `report.json`.
        """
        folder = Path(folder)
        if self.flags:
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f".{FLAGS_FILE}"  # numpy appends .npz to other endings
            arrays: dict[str, Any] = {name: np.asarray(value) for name, value in self.flags.items()}
            np.savez_compressed(part, **arrays)
            os.replace(part, folder / FLAGS_FILE)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return write_text(folder / REPORT_FILE, text)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> EvaluationReport:
        """Read what [`save`] wrote.

        Args:
            folder (`str` or `PathLike`): the folder.

        Returns:
            [`EvaluationReport`]: with the flags, where they are there.

        Raises:
            FileNotFoundError: without a report there.
            ValueError: for a file that is another kind of report.
        """
        file = Path(folder) / REPORT_FILE
        if not file.is_file():
            raise FileNotFoundError(f"no evaluation in {str(folder)!r}: pass the output_dir of an evaluation")
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.pop("kind", None) != _KIND:
            raise ValueError(
                f"{str(file)!r} is not the report of an evaluation (one of a training has the same name): pass the "
                "output_dir of an evaluation"
            )
        known = {entry.name for entry in fields(cls)}
        report = cls(**{key: value for key, value in values.items() if key in known})
        flags = Path(folder) / FLAGS_FILE
        if flags.is_file():
            with np.load(flags, allow_pickle=False) as stored:
                report.flags = {name: torch.from_numpy(stored[name]) for name in stored.files}
        return report

    def table(self) -> str:
        """The figures as lines for a terminal: accuracy, interval and, where there is one, the published figure.

        Returns:
            `str`: a line per metric, then what limits them.
        """
        published = dict((self.leaderboard or {}).get("metrics") or {})
        rows = [("", "accuracy", "95 % interval", *(("published",) if published else ()))]
        for name, value in self.metrics.items():
            low, high = self.intervals.get(name, (value, value))
            other = (f"{published[name]:.1%}" if name in published else "\u2013",) if published else ()
            rows.append((_title(name), f"{value:.1%}", f"{low:.1%} to {high:.1%}", *other))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) if k == 0 else cell.rjust(width) for k, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        seconds = sum(self.seconds.values())
        lines.append(f"n = {self.n}, seed {self.seed}, {self.dtype}, {seconds:.0f} s")
        if self.corruptions:
            notes = "".join(f"; {note}" for note in self.corruptions.get("notes") or ())
            lines.append(f"corruptions: {self.corruptions['name']}, {self.corruptions['n']} images per cell{notes}")
        if self.leaderboard:
            board = self.leaderboard
            where = f"{board.get('source')} -> {board.get('target')}, {str(board.get('mode')).upper()}"
            lines.append(f"published: {board.get('method')}, {where} ({board.get('origin_title')})")
        return "\n".join([*lines, *(f"Warning: {text}" for text in self.warnings)])

    def to_result(self, model: str | None = None, protocol: str = "evaluation") -> dict[str, Any]:
        """Give the entry of [`EncoderReport`]'s `results`, for the model card.

        Args:
            model (`str`, *optional*): name in the card's tables; default: that of the report.
            protocol (`str`, defaults to `"evaluation"`): such as `"fine-tuned by SLF"`, for the card of an encoder.

        Returns:
            `dict`: metrics, where `accuracy` has the name that cards use, `standard_accuracy`; their intervals, how
            they were measured and what limits them.
        """
        named = {("standard_accuracy" if key == "accuracy" else key): value for key, value in self.metrics.items()}
        dataset = {key: self.dataset[key] for key in ("name", "split", "hub_id") if self.dataset.get(key)}
        corrupted = int(self.corruptions.get("n") or self.n)
        notes = [str(self.corruptions.get("name") or ""), *map(str, self.corruptions.get("notes") or ())]
        known = {
            "intervals": {("standard_accuracy" if key == "accuracy" else key): v for key, v in self.intervals.items()},
            "n_of": {key: corrupted for key in named if "mean_accuracy" in key and corrupted != self.n},
            "attack": self._pgd(),
            "autoattack": [str(stage["name"]) for stage in self.stages],
            "corruptions": "; ".join(note for note in notes if note),
            "warnings": list(self.warnings),
            "command": self.command,
            "commit": self.commit,
            "hardware": dict(self.hardware),
            "date": self.date,
        }
        return {
            "model": model or self.model.get("name"),
            "metrics": named,
            "protocol": protocol,
            "n_eval": self.n,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "dataset": dataset,
            "seconds": sum(self.seconds.values()),
            **{key: value for key, value in known.items() if value},
        }

    def _pgd(self) -> dict[str, Any]:
        """How PGD was run, where it was: the step is a quarter of the budget."""
        if not any(str(describe_metric(name).get("attack", "")).startswith("pgd") for name in self.metrics):
            return {}
        step = {"norm": self.norm, "eps": self.eps, "step_size": self.eps / 4}
        return {**step, "random_start": True, "loss": "cross-entropy", "iterate": "last"}


def _title(name: str) -> str:
    return {"accuracy": "Standard accuracy"}.get(name) or metric_title(name)


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {str(key): _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return redact(os.fspath(value)) if isinstance(value, os.PathLike) else value
