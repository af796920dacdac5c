"""AutoLoRa: robust fine-tuning without settings to search; clean images pass low-rank adapters of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hf_robust.attacks import PGD
from hf_robust.losses import cross_entropy, kl_divergence
from hf_robust.objectives.base import AccuracyRequest, StepContext, SupervisedObjective, check_rank

__all__ = ["AutoLoRa", "autolora_weights"]


def autolora_weights(standard_accuracy: float, max_kl_weight: float = 6.0) -> tuple[float, float, float]:
    """Weights of the clean, the adversarial and the divergence term, from the accuracy of the clean path.

    Args:
        standard_accuracy (`float`): share of clean images that are classified rightly, in [0, 1].
        max_kl_weight (`float`, defaults to 6, as published): weight of the divergence at an accuracy of 1.

    Returns:
        `tuple[float, float, float]`: 1 - SA, SA and `max_kl_weight` SA.

    Raises:
        ValueError: for an accuracy outside [0, 1].
    """
    if not 0 <= standard_accuracy <= 1:
        raise ValueError(f"standard_accuracy must be in [0, 1], got {standard_accuracy}: divide percent by 100")
    return 1 - standard_accuracy, standard_accuracy, max_kl_weight * standard_accuracy


@dataclass
class AutoLoRa(SupervisedObjective):
    """(1 - SA) CE(clean) + SA CE(adversarial) + 6 SA KL(p(clean) || p(adversarial)), with SA the standard accuracy.

    Clean images pass the path `"lora"`: adapters on, the encoder's own weights held constant. Adversarial images
    pass `"adv"`: adapters off. So the clean terms train the adapters and the classifier, the adversarial terms the
    encoder and the classifier. While the clean path errs, its own loss rules; the better it gets, the more the
    adversarial path follows it. Afterwards the adapters are thrown away, not merged.

    Reads with: `adapters.with_lora_path` (the two paths), `auto_lr` (the learning rate). Takes the place of AFF where
    nobody wants to search for learning rates and weights.

    Source: Xu et al. 2024. RobustSSL_Benchmark@19dc714, `Finetuning_Methods/AutoLoRa/utils.py`: attack of ten steps
        from Gaussian noise of 0.001 on the cross-entropy of the adversarial path; clean pass first. `formulation`
        chooses where SA comes from: `"paper"`: clean path, validation images, once per epoch; `"released"`: that code
        measures the *adversarial* path on its augmented training images, at the beginning of an epoch and after each
        quarter.
    """

    training_attack: ClassVar[PGD] = PGD(steps=10, start_std=0.001)
    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "per_device_train_batch_size": 128,
            "learning_rate": 0.1,
            "lr_rule": "auto",
            "auto_lr_epochs": [16, 24, 28, 36, 40, 42, 44, 46, 48],
            "num_train_epochs": 50,
            "weight_decay": 2e-4,
            "momentum": 0.9,
            "optimizer": "sgd",
            "nesterov": False,
            "warmup_epochs": 0.0,
        }
    )
    citation: ClassVar[str] = """@inproceedings{xu2024autolora,
  title     = {AutoLoRa: An Automated Robust Fine-Tuning Framework},
  author    = {Xu, Xilie and Zhang, Jingfeng and Kankanhalli, Mohan},
  booktitle = {International Conference on Learning Representations},
  year      = {2024}
}"""

    rank: int = field(default=8, metadata={"help": "Rank of the adapters of the clean path; published: 8."})
    max_kl_weight: float = field(
        default=6.0, metadata={"help": "Weight of the divergence at a standard accuracy of 1; published: 6."}
    )
    formulation: Literal["paper", "released"] = field(
        default="paper",
        metadata={"help": "Accuracy behind the weights; paper: clean path, validation; released: adversarial, train."},
    )
    init: Literal["matched", "peft"] = field(
        default="matched", metadata={"help": "First weights of the adapters: matched to the released code, or PEFT's."}
    )
    norm_update: Literal["both", "plain_only"] = field(
        default="both", metadata={"help": "Passes that move the running statistics; both: released; or without clean."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)
        if not 0 < self.max_kl_weight < float("inf"):
            raise ValueError(f"max_kl_weight must be positive, got {self.max_kl_weight}: the published value is 6")
        known = {
            "formulation": ("paper", "released"),
            "init": ("matched", "peft"),
            "norm_update": ("both", "plain_only"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} must be {values[0]!r} or {values[1]!r}, got {getattr(self, name)!r}: the default is "
                    f"{values[0]!r}"
                )

    @property
    def paths(self) -> tuple[str, ...]:
        """The network with and without its adapters."""
        return ("lora", "adv")

    @property
    def accuracy_request(self) -> AccuracyRequest:
        """Paper: the clean path on validation images; released: the adversarial path on training images."""
        if self.formulation == "paper":
            return AccuracyRequest("lora", "validation", 1)
        return AccuracyRequest("adv", "train", 5)

    def term_weights(self, standard_accuracy: float) -> dict[str, float]:
        """`lambda_1` of the clean term and `lambda_2` of the divergence; see `Objective.term_weights`."""
        clean, _, kl = autolora_weights(standard_accuracy, self.max_kl_weight)
        return {"lambda_1": clean, "lambda_2": kl}

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return the terms `clean`, `adversarial` and `kl`; see `Objective.__call__`. The batch holds `label`."""
        labels = self.labels(batch)
        x_adv = self.attack_cross_entropy(model, batch, context)
        logits, logits_adv = model([("lora", batch[self.augmentation]), ("adv", x_adv)])
        weights = autolora_weights(context.standard_accuracy, self.max_kl_weight)
        clean_weight, adversarial_weight, kl_weight = weights
        return {
            "clean": clean_weight * cross_entropy(logits, labels),
            "adversarial": adversarial_weight * cross_entropy(logits_adv, labels),
            "kl": kl_weight * kl_divergence(logits, logits_adv),
        }
