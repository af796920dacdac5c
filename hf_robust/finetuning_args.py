"""Training arguments of robust fine-tuning: plain SGD, a held-out part of the training images, a rule for the rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hf_robust.objectives.base import Objective
from hf_robust.training_args import RobustTrainingArguments

__all__ = ["RobustFinetuningArguments", "falls"]


_NO_PROBE = "held-out images are measured after every epoch"


@dataclass(repr=False)  # the stock one hides the access token
class RobustFinetuningArguments(RobustTrainingArguments):
    """[`RobustTrainingArguments`] for classifiers: the published schedules, and a choice of the epoch that is honest.

    The published fine-tuning runs keep the last epoch (vanilla) or the one of best PGD-20 accuracy on the *test* set
    (AutoLoRa). Here a stratified twentieth of the training images is held out and decides; the test images are never
    seen before the training is over.

    With `lr_rule="auto"` the rate is halved by the rule of AutoLoRa, see [`AutoLearningRate`], and the best weights so
    far are put back each time.

    Source: RobustSSL_Benchmark@19dc714, `Finetuning_Methods/Vanilla_Finetuning/vanilla_finetuning.py` and `utils.py`
        (SGD without Nesterov, weight decay 2e-4, tenfold drops); `Finetuning_Methods/AutoLoRa/utils.py` (auto).
    """

    other_advice: ClassVar[dict[str, str]] = {
        "lr_scheduler_type": "the schedule is --lr_rule (milestones, auto, cosine)",
        "lr_scheduler_kwargs": "the schedule is --lr_rule (milestones, auto, cosine)",
        "warmup_steps": "write --warmup_epochs, with --lr_rule cosine",
        "eval_strategy": _NO_PROBE,
        "eval_on_start": _NO_PROBE,
        "load_best_model_at_end": "--keep best (the default) does it, by accuracy under attack on held-out images",
        "label_smoothing_factor": "no published method smooths labels",
    }

    output_dir: None | str = field(
        default="outputs/finetune", metadata={"help": "Folder for everything the run leaves."}
    )
    num_train_epochs: float = field(default=25.0, metadata={"help": "Epochs; published: 25, AutoLoRa 50."})
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Images per process and step; published: 128, linear modes 512."}
    )
    learning_rate: float = field(default=0.1, metadata={"help": "First learning rate; published: 0.1, linear 0.01."})
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Images per process when accuracy is measured; random starts depend on it."}
    )
    weight_decay: float = field(
        default=2e-4, metadata={"help": "Weight decay on every trained tensor; published: 2e-4."}
    )
    optimizer: Literal["lars", "sgd", "adamw"] = field(
        default="sgd", metadata={"help": "sgd (published), adamw (for transformers) or lars."}
    )
    nesterov: bool = field(default=False, metadata={"help": "Nesterov momentum of sgd; published: false."})
    warmup_epochs: float = field(default=0.0, metadata={"help": "Linear warm-up of lr_rule cosine, in epochs."})
    lr_rule: Literal["milestones", "auto", "cosine"] = field(
        default="milestones",
        metadata={"help": "milestones: a tenth after each of lr_milestones; auto: halved by validation; cosine."},
    )
    lr_milestones: list[float] | None = field(
        default=None, metadata={"help": "Epochs after which the rate falls to a tenth; none: it stays."}
    )
    auto_lr_epochs: list[int] | None = field(
        default=None, metadata={"help": "Epochs at which lr_rule auto looks back; unset: every fourth."}
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the training images, per class, that is held out to choose by."}
    )
    validation_steps: int = field(
        default=20, metadata={"help": "PGD steps of 2/255 on the validation images after every epoch; published: 20."}
    )
    keep: Literal["best", "last"] = field(
        default="best", metadata={"help": "Weights kept: best validation PGD accuracy, or the last (vanilla)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("lr_rule", ("milestones", "auto", "cosine")), ("keep", ("best", "last"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must be in [0, 1), got {self.validation_fraction}: 0.05 holds a twentieth out"
            )
        if self.probe_every:
            raise ValueError(f"probe_every={self.probe_every} has no effect here: {_NO_PROBE}")
        if self.validation_steps < 1:
            raise ValueError(f"validation_steps must be 1 or more, got {self.validation_steps}: published is 20")
        if self.lr_rule == "auto" or self.keep == "best":
            self._check_chosen_by_validation()
        if self.lr_rule != "milestones" and self.lr_milestones:
            raise ValueError(f"lr_milestones={self.lr_milestones} need --lr_rule milestones, got {self.lr_rule!r}")
        if self.lr_rule != "auto" and self.auto_lr_epochs:
            raise ValueError(f"auto_lr_epochs={self.auto_lr_epochs} need --lr_rule auto, got {self.lr_rule!r}")
        self._check_within_the_run()
        if self.lr_rule != "cosine" and self.warmup_epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} need --lr_rule cosine, got {self.lr_rule!r}")

    def _check_within_the_run(self) -> None:
        late = [m for m in self.lr_milestones or () if m >= self.num_train_epochs]
        late += [e for e in self.auto_lr_epochs or () if e >= self.num_train_epochs]
        if late and self.max_steps <= 0:
            name = "lr_milestones" if self.lr_milestones else "auto_lr_epochs"
            raise ValueError(
                f"{name} {late} lie beyond the {self.num_train_epochs:g} epochs of the run, where no rate can fall "
                f"any more: give --{name} for this length, such as {self.num_train_epochs * 0.6:.0f} "
                f"{self.num_train_epochs * 0.8:.0f}"
            )

    def _check_chosen_by_validation(self) -> None:
        if not self.validation_fraction:
            what = "lr_rule auto halves the rate" if self.lr_rule == "auto" else "keep best chooses the epoch"
            raise ValueError(
                f"{what} by validation images and validation_fraction is 0: set it to 0.05, or write --keep last "
                "--lr_rule milestones"
            )

    @property
    def halving_epochs(self) -> tuple[int, ...]:
        """Epochs at which the automatic rule looks back; none for the other rules."""
        if self.lr_rule != "auto":
            return ()
        if self.auto_lr_epochs is not None:
            return tuple(self.auto_lr_epochs)
        return tuple(range(4, int(self.num_train_epochs), 4))

    @classmethod
    def of(cls, objective: Objective, **changes: Any) -> RobustFinetuningArguments:
        """The published settings of a method; in a run of another length the rate falls at the same shares of it.

        Args:
            objective ([`Objective`]): has a `recipe`.
            changes (`Any`): fields that are to differ from it.

        Returns:
            [`RobustFinetuningArguments`].
        """
        epochs = changes.get("num_train_epochs", objective.recipe["num_train_epochs"])
        rule = changes.get("lr_rule", objective.recipe.get("lr_rule", "milestones"))
        return cls(**{**objective.recipe, **falls(objective.recipe, epochs, rule), **changes})


def falls(recipe: Mapping[str, Any], epochs: float, lr_rule: str) -> dict[str, Any]:
    """When the rate may fall in a run of another length than the published one: at the same shares of it.

    Args:
        recipe (`Mapping`): of a method, with `num_train_epochs`.
        epochs (`float`): length of the run.
        lr_rule (`str`): of the run; what belongs to another rule falls away.

    Returns:
        `dict`: `lr_milestones` and `auto_lr_epochs`.
    """
    share = epochs / recipe["num_train_epochs"]
    milestones = [m * share for m in recipe.get("lr_milestones") or ()]
    halving = sorted({max(1, round(e * share)) for e in recipe.get("auto_lr_epochs") or ()})
    halving = [e for e in halving if e < epochs]
    return {
        "lr_milestones": (milestones or None) if lr_rule == "milestones" else None,
        "auto_lr_epochs": (halving or None) if lr_rule == "auto" else None,
    }
