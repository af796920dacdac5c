"""What an evaluation measures, one method per metric, and the report it ends in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attacks import PGD
from .environment import collect_environment
from .evaluation_parts import EvaluationParts, Predictions, predict, world
from .evaluation_report import EvaluationReport
from .judged_images import JudgedImages
from .leaderboard import closest_row
from .pixel_classifier import PixelClassifier
from .probe import stratified_indices
from .report import attack_metric_name, binomial_interval, format_eps

__all__ = ["PRESETS", "EvaluationJob", "published_row"]

_CURVE_STEPS = 20
_CURVE = tuple(levels / 255 for levels in (1, 2, 4, 8, 12, 16, 24, 32))
_L2_CURVE = (0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # times the budget
PRESETS = {"standard": "autoattack", "fast": "autoattackfast", "smoke": "autoattacksmoke"}


@dataclass
class EvaluationJob:
    """An evaluation on its way: what is measured, and what was found so far."""

    classifier: PixelClassifier
    images: JudgedImages
    parts: EvaluationParts
    eps: float
    norm: Any
    preset: Any
    seed: int
    batch_size: int
    progress: bool
    arrays: str | Path | None
    metrics: dict[str, float] = field(default_factory=dict)
    flags: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)  # other fields of the report
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def run(self, name: str) -> None:
        """Measure one metric."""
        if name == "autoattack":
            self.autoattack()
        elif name == "corruptions":
            self.corruptions()
        elif name != "accuracy":
            self.pgd(int(name.removeprefix("pgd")))

    def _predict(self, part: str, images: JudgedImages, attack: PGD | None, title: str) -> Predictions:
        return predict(
            self.classifier,
            images,
            part,
            self.parts,
            size=self.classifier.image_size,
            attack=attack,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.classifier.device,
            progress=self.progress,
            title=f"{title} on {images.name}",
        )

    def _note(self, part: str, seconds: float, forwards: int, backwards: int) -> None:
        self.seconds[part] = round(seconds, 3)
        self.counts[part] = {"forwards": forwards, "backwards": backwards}

    def clean(self) -> None:
        """Accuracy on clean images."""
        found = self._predict("clean", self.images, None, "accuracy")
        self.flags |= {"index": self.images.indices, "label": self.images.labels, "prediction": found.classes}
        self.flags["clean"] = found.classes == self.images.labels
        self.metrics["accuracy"] = _share(self.flags["clean"])
        self._note("clean", found.seconds, found.forwards, found.backwards)

    def pgd(self, steps: int) -> None:
        """Accuracy under PGD with so many steps of a quarter of the budget (2/255 of 8/255, as published)."""
        attack = PGD(self.eps, self.eps / 4, steps, self.norm)
        name = attack_metric_name(f"pgd{steps}", self.norm, self.eps)
        found = self._predict(name.removesuffix("_accuracy"), self.images, attack, f"PGD-{steps}")
        self.flags[f"pgd{steps}"] = found.classes == self.images.labels
        self.metrics[name] = _share(self.flags[f"pgd{steps}"])
        self._note(f"pgd{steps}", found.seconds, found.forwards, found.backwards)

    def autoattack(self) -> None:
        """Accuracy under AutoAttack, or under the preset that is a part of it."""
        from .autoattack import autoattack

        name = PRESETS[self.preset]
        metric = attack_metric_name(name, self.norm, self.eps)
        rows = range(len(self.images))
        found = autoattack(
            self.classifier,
            self.images.pixels(rows, self.classifier.image_size),
            self.images.labels,
            eps=self.eps,
            norm=self.norm,
            preset=self.preset,
            batch_size=self.batch_size,
            seed=self.seed,
            state_file=self.parts.file(f"{metric.removesuffix('_accuracy')}.npz"),
            progress=self.progress,
        )
        self.flags["autoattack"] = found.robust
        self.metrics[metric] = found.accuracy
        self.found["stages"] = [
            {
                "name": stage.name,
                "robust": int(stage.robust.sum()),
                "accuracy": stage.accuracy,
                "seconds": round(stage.seconds, 3),
                "forwards": stage.forwards,
                "backwards": stage.backwards,
            }
            for stage in found.stages
        ]
        self.found["versions"] = dict(found.versions)
        self.warnings += found.warnings
        for stage in found.stages:
            self.flags[f"autoattack_after_{stage.name.replace('-', '_')}"] = stage.robust
        passes = [sum(getattr(stage, kind) for stage in found.stages) for kind in ("forwards", "backwards")]
        self._note("autoattack", found.seconds, *passes)

    def corruptions(self) -> None:
        """Accuracy under common corruptions, on the published arrays or on generated ones."""
        from .corruptions import corruption_accuracy, load_published_corruptions

        indices, source = None, self.arrays
        if source is None:
            data: Any = self.images.stored()
        else:
            data, labels = source, load_published_corruptions(source, "brightness", 1)[1]
            if len(self.images) < len(labels) and len(self.images) < self.images.n_total:
                indices = stratified_indices(labels, len(self.images), self.seed).tolist()
        size = self.classifier.image_size or max(self.images.image_size)
        started = time.perf_counter()
        logits: Any = self.classifier
        if self.images.channels == 1:  # corrupted images have colours, the network takes none
            logits = lambda x: self.classifier(x.mean(1, keepdim=True))  # noqa: E731
        found = corruption_accuracy(
            logits,
            data,
            size=size,
            indices=indices,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.classifier.device,
            shared=world()[1] > 1,
            state_file=self.parts.file(f"corruptions_{'published' if source else 'generated'}.json"),
            progress=self.progress,
        )
        self.metrics |= found.to_dict()
        self.found["corruptions"] = {
            "name": found.title,
            "published": found.published,
            "mean": found.mean,
            "n": found.n,
            "constants": found.constants,
            "table": {name: {str(k): v for k, v in row.items()} for name, row in found.table.items()},
            "notes": list(found.notes),
        }
        cells = sum(map(len, found.table.values()))
        self._note("corruptions", time.perf_counter() - started, cells * found.n, 0)

    def curve(self, n: int) -> None:
        """PGD-20 over growing budgets, on a part of the images: with a large one every attack that works wins."""
        from .robustness_pictures import curve_doubtful, curve_remark

        labels = self.images.labels
        images = self.images
        if n < len(labels):
            n = max(n, len(labels.unique()))
            images = self.images.part(stratified_indices(labels, n, self.seed))
        clean = self.flags["clean"][torch.isin(self.images.indices, images.indices)]
        points = [[0.0, _share(clean)]]
        budgets = _CURVE if self.norm == "linf" else tuple(factor * self.eps for factor in _L2_CURVE)
        seconds = 0.0
        for eps in sorted({*budgets, self.eps}):
            attack = PGD(eps, eps / 4, _CURVE_STEPS, self.norm)
            part = f"curve_{self.norm}_{format_eps(eps).replace('/', '_')}_{len(images)}"
            found = self._predict(part, images, attack, f"PGD-{_CURVE_STEPS}, eps {format_eps(eps)}")
            points.append([eps, _share(found.classes == images.labels)])
            seconds += found.seconds
        passes = (len(points) - 1) * len(images)
        self._note("curve", seconds, passes * (_CURVE_STEPS + 1), passes * _CURVE_STEPS)
        curve = {eps: accuracy for eps, accuracy in points}
        remark = curve_remark(curve, len(images), self.norm)
        self.found["curve"] = {"points": points, "n": len(images), "steps": _CURVE_STEPS, "remark": remark}
        if curve_doubtful(curve, len(images), self.norm):
            self.warnings.append(remark)

    def report(self, split: str | None = None, command: str | None = None) -> EvaluationReport:
        """Everything that was found."""
        environment, images = collect_environment(), self.images
        self._compare_attacks()
        versions = {**environment.pop("versions"), **self.found.pop("versions", {})}
        size = self.classifier.image_size or images.image_size[0]
        dataset = {
            "name": images.name,
            "hub_id": images.name if "/" in images.name else None,
            "split": split,
            "n": len(images),
            "n_total": images.n_total,
            "image_size": size,
            "stored_size": list(images.image_size),
            "choice": "all" if len(images) == images.n_total else "stratified by class, see flags.npz",
        }
        model = self.classifier.facts()
        intervals = {}
        if self.found.get("corruptions"):  # cells share their images: their mean varies as one cell at most
            name, n = next(reversed(self.metrics)), int(self.found["corruptions"]["n"])
            name = next((m for m in self.metrics if m.endswith("mean_accuracy")), name)
            intervals[name] = list(binomial_interval(self.metrics[name], n))
        return EvaluationReport(
            metrics=self.metrics,
            n=len(images),
            eps=self.eps,
            norm=self.norm,
            preset=self.preset,
            seed=self.seed,
            batch_size=self.batch_size,
            intervals=intervals,
            classes=self._classes(),
            counts=self.counts,
            seconds=self.seconds,
            warnings=list(dict.fromkeys(self.warnings)),
            model=model,
            dataset={key: value for key, value in dataset.items() if value is not None},
            leaderboard=published_row(model, images.name),
            versions=versions,
            command=command,
            date=date.today().isoformat(),
            flags=self.flags,
            **environment,
            **self.found,
        )

    def _classes(self) -> dict[str, Any]:
        """Accuracy of each class on every kind of image."""
        labels, count = self.images.labels, int(self.classifier.num_classes or 0)
        counts = torch.bincount(labels, minlength=count)
        names = self.images.label_names or self.classifier.label_names
        kinds = [kind for kind in self.flags if kind == "clean" or kind.startswith(("pgd", "autoattack"))]
        accuracies = {}
        for kind in kinds:
            if "_after_" not in kind:
                right = torch.bincount(labels[self.flags[kind]], minlength=count)
                accuracies[kind] = [int(r) / int(n) if n else None for r, n in zip(right, counts, strict=True)]
        return {"names": list(names) if names else None, "counts": counts.tolist(), "accuracies": accuracies}

    def _compare_attacks(self) -> None:
        """AutoAttack is the stronger attack: what PGD breaks and it does not is worth a sentence."""
        robust = self.flags.get("autoattack")
        for kind in [kind for kind in self.flags if kind.startswith("pgd")]:
            missed = 0 if robust is None else int((robust & ~self.flags[kind]).sum())
            if robust is not None and missed:
                both = _share(robust & self.flags[kind])
                self.warnings.append(
                    f"{kind.upper()} broke {missed} of {len(robust)} images that AutoAttack ({self.preset}) left "
                    f"right; together they leave {both:.1%}. A few images are chance, more say that the attacks meet "
                    "masked gradients."
                )


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def published_row(model: Mapping[str, Any], dataset: str) -> dict[str, Any] | None:
    """The row of the public leaderboard for the method that a classifier says it was made by.

    Args:
        model (`Mapping`): facts of the classifier: `method`, `mode`, `pretrained_on`, *optional* `coreset`.
        dataset (`str`): what it was judged on.

    Returns:
        `dict` or `None`: see [`LeaderboardRow`]; nothing rather than the row of another method.
    """
    method, mode, source = (str(model.get(key) or "") for key in ("method", "mode", "pretrained_on"))
    if not (method and mode and source):
        return None
    method = f"{method}-{model['coreset']}" if model.get("coreset") else method
    tuned = "autolora" if mode.lower() == "autolora" else "vanilla"
    row = closest_row(method, "aff" if tuned == "autolora" else mode, source, dataset, tuned)
    return None if row is None else row.to_dict()
