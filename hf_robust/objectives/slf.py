"""SLF: standard linear fine-tuning, a linear classifier on a frozen encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hf_robust.losses import cross_entropy
from hf_robust.objectives.base import StepContext, SupervisedObjective

__all__ = ["SLF"]


@dataclass
class SLF(SupervisedObjective):
    """Cross-entropy on clean images; only the classifier trains, on features that stand still.

    Reads with: `models.modeling` (`head="classifier"`, a frozen backbone). Shows what an encoder holds without
    being changed; its robustness is the encoder's own.

    Source: RobustSSL_Benchmark@19dc714, `Finetuning_Methods/Vanilla_Finetuning/utils.py`. The whole network stays in
        evaluation mode, so that the running statistics of the adversarial branch are used and never moved. Published
        runs: 512 images per step, SGD 0.01 (CIFAR-10; other data sets up to 0.1), a tenth after epochs 10 and 20.
    """

    trains: ClassVar[Literal["all", "classifier", "adapter"]] = "classifier"
    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "per_device_train_batch_size": 512,
            "learning_rate": 0.01,
            "lr_milestones": [10, 20],
            "num_train_epochs": 25,
            "weight_decay": 2e-4,
            "momentum": 0.9,
            "optimizer": "sgd",
            "nesterov": False,
            "warmup_epochs": 0.0,
        }
    )
    citation: ClassVar[str] = """@inproceedings{fan2021does,
  title     = {When Does Contrastive Learning Preserve Adversarial Robustness from Pretraining to Finetuning?},
  author    = {Fan, Lijie and Liu, Sijia and Chen, Pin-Yu and Zhang, Gaoyuan and Gan, Chuang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021}
}"""

    @property
    def adversarial(self) -> bool:
        """No: clean images pass the adversarial branch."""
        return False

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return `{"clean": cross-entropy}`; see `Objective.__call__`. The batch holds `label`, int64 `(N,)`."""
        labels = self.labels(batch)
        (logits,) = model([("adv", batch[self.augmentation])])
        return {"clean": cross_entropy(logits, labels)}
