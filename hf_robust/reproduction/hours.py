"""Predicted hours: forward passes counted from the settings of a command, divided by a stated rate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["NETWORKS", "Rate", "Work", "evaluation_passes", "finetuning_passes", "pretraining_passes"]

# FLOP of a forward pass of one image by architecture and side, and those of one view; a test counts them.
NETWORKS: Mapping[tuple[str, int], float] = {
    ("resnet18_cifar", 32): 1.111e9,
    ("resnet18_stl", 96): 0.666e9,
    ("wide_resnet28_10", 32): 10.487e9,
}
EPOCH_IMAGES, EPOCH_PASSES = 50_000, 32.0  # of the epoch that a rate is stated by: ACL, CIFAR-10, two views
PEAK, UTILISATION = 790e12, 0.30
_FP32 = 0.5  # of the bf16 rate: convolutions in TF32
_RIGHT, _WITHSTANDS = 200.0, 9500.0  # passes of AutoAttack for an image that is answered rightly, that withstands
_GUESS = (0.8, 0.45)  # standard and robust accuracy, where nothing is published


@dataclass(frozen=True)
class Work:
    """Arithmetic of a stage.

    Args:
        flops (`float`): floating-point operations.
        precision (`str`): `"bf16"` or `"fp32"`.
    """

    flops: float
    precision: str = "bf16"


@dataclass(frozen=True)
class Rate:
    """How fast a GPU is taken to be.

    Args:
        flops_per_second (`float`): in bf16; float32 is taken to run at half of it.
        told (`str`): where that comes from, for people.
    """

    flops_per_second: float
    told: str

    def hours(self, work: Work) -> float:
        """Hours that some work takes.

        Args:
            work ([`Work`]): of a stage.
        """
        return work.flops / self.flops_per_second / (1 if work.precision == "bf16" else _FP32) / 3600

    @property
    def epoch_seconds(self) -> float:
        """Seconds of an ACL epoch of ResNet-18 on CIFAR-10 in bf16."""
        return EPOCH_IMAGES * EPOCH_PASSES * NETWORKS["resnet18_cifar", 32] / self.flops_per_second

    @classmethod
    def assumed(cls) -> Rate:
        """That of one H200 in a model: nothing was measured on a GPU."""
        told = f"assumed, not measured: one H200 at {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s in bf16"
        return cls(PEAK * UTILISATION, told)

    @classmethod
    def of_epoch(cls, seconds: float, told: str | None = None) -> Rate:
        """From the time of an ACL epoch of ResNet-18 on CIFAR-10 (50,000 images, 5 attack steps) in bf16.

        Args:
            seconds (`float`): of the epoch.
            told (`str`, *optional*): where it comes from.

        Raises:
            ValueError: for a time that is not positive.
        """
        if not seconds > 0:
            raise ValueError(f"seconds_per_epoch must be positive, got {seconds}: an H200 is predicted to take 7.5")
        rate = EPOCH_IMAGES * EPOCH_PASSES * NETWORKS["resnet18_cifar", 32] / seconds
        return cls(rate, told or f"{seconds:g} seconds per ACL epoch of CIFAR-10, as given by --seconds_per_epoch")

    @classmethod
    def of_benchmark(cls, file: str | Path) -> Rate:
        """From a file of `python -m benchmarks --only acl --json FILE`, ResNet-18.

        Args:
            file (`str` or `Path`): the file; the eager bf16 step counts, which is what the commands run.

        Raises:
            ValueError: for another file, another network, or one without that measurement.
        """
        way_out = "write one with python -m benchmarks --preset gpu_short --json FILE"
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
            results = {entry["name"]: entry for entry in values["results"]}
            model = values["settings"].get("model") or "resnet18"
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{str(file)!r} is not a file of benchmarks ({error!r}): {way_out}") from None
        found = results.get("acl/bf16/eager", {})
        if model != "resnet18" or "epoch_seconds" not in found:
            raise ValueError(
                f"{str(file)!r} has no acl/bf16/eager of resnet18, it holds {', '.join(results)} of {model}: {way_out}"
            )
        hardware = (values.get("environment") or {}).get("hardware") or {}
        machine = hardware.get("gpu") or hardware.get("cpu") or "an unknown machine"
        seconds = float(found["epoch_seconds"])
        return cls.of_epoch(seconds, f"measured by benchmarks on {machine}: {seconds:.3g} seconds per ACL epoch")


def pretraining_passes(settings: Mapping[str, Any], images: int) -> float:
    """Forward passes of one image that a pre-training is worth; a backward pass counts as one, weights as another.

    Args:
        settings (`Mapping`): flags by name, those of the configuration file included.
        images (`int`): of the split.

    Source: counted, see `docs/performance.md`; the tests count again.
    """
    views, per_view = _step(settings)
    epochs, kind = float(settings["num_train_epochs"]), str(settings.get("coreset", "full"))
    if kind == "full":
        return epochs * images * views * per_view
    held_out = float(settings.get("coreset_validation_fraction", 0.01 if kind == "rcs" else 0))
    pool, warmup = images * (1 - held_out), float(settings["coreset_warmup_epochs"])
    share, interval = float(settings["coreset_fraction"]), float(settings["coreset_interval"])
    shown = pool * (warmup + share * (epochs - warmup)) * views * per_view
    if kind != "rcs":
        return shown
    steps = int(settings.get("coreset_attack_steps", settings.get("steps", 5)))
    streams = 1 if settings.get("objective") == "sat" else 2
    candidates = pool * views * (2 * steps + streams)
    picks = share * pool / int(settings["per_device_train_batch_size"])
    validation = picks * images * held_out * (2 * int(settings.get("coreset_validation_steps", 3)) + 1)
    return shown + (epochs - warmup) / interval * (candidates + validation)


def _step(settings: Mapping[str, Any]) -> tuple[int, float]:
    """Views of an image, and passes of each in a training step."""
    objective, steps = settings.get("objective", "acl"), int(settings.get("steps", 5))
    if objective == "sat":
        return 1, 2 * steps + 3
    if objective == "simclr":
        return 2, 3
    # Of the momentum encoder, half of the views pass forward only.
    training = {"air": 7.5, "dynacl": 4.0 if settings.get("ema_decay") else 6.0}.get(str(objective), 6.0)
    return 2, 2 * steps + training


def finetuning_passes(settings: Mapping[str, Any], images: int) -> float:
    """Forward passes of one image that a fine-tuning is worth, held-out images included.

    Args:
        settings (`Mapping`): flags by name, those of the preset included.
        images (`int`): of the split.
    """
    mode, epochs = settings["mode"], float(settings["num_train_epochs"])
    held_out = float(settings.get("validation_fraction", 0))
    per_image = {"slf": 1.0, "alf": 21.0, "aff": 27.0, "autolora": 26.0, "lp_aff": 27.0}[mode]
    measured = 2 * int(settings.get("validation_steps", 20)) + 1
    passes = epochs * images * ((1 - held_out) * per_image + held_out * measured)
    return passes + (images * (1 + float(settings["probe_stage_epochs"])) if mode == "lp_aff" else 0)


def evaluation_passes(metrics: list[str], images: int, standard: float | None, robust: float | None) -> float:
    """Forward passes of one image that an evaluation is worth.

    AutoAttack goes on with what withstands: 200 passes for an image that is answered rightly (APGD-CE), 9,500 more
    for one that withstands to the end (APGD-T, FAB-T, 5,000 queries of Square).

    Args:
        metrics (`list[str]`): of `"accuracy"`, `"pgd20"` and `"autoattack"`.
        images (`int`): that are judged.
        standard, robust (`float`, *optional*): published accuracies; default: 0.8 and 0.45.
    """
    right, withstands = (value if value is not None else _GUESS[k] for k, value in enumerate((standard, robust)))
    known = {"accuracy": 1.0, "pgd20": 41.0, "autoattack": _RIGHT * right + _WITHSTANDS * withstands}
    return images * sum(known[name] for name in metrics)
