"""ALF: adversarial linear fine-tuning, a linear classifier trained on attacked images; the encoder is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hf_robust.attacks import PGD
from hf_robust.losses import cross_entropy
from hf_robust.objectives.base import StepContext, SupervisedObjective
from hf_robust.objectives.slf import SLF

__all__ = ["ALF"]


@dataclass
class ALF(SupervisedObjective):
    """Cross-entropy on images that were attacked to raise it; only the classifier trains.

    Reads with: `objectives.slf`, which is the same on clean images. There is no clean term.

    Source: RobustSSL_Benchmark@19dc714, `Finetuning_Methods/Vanilla_Finetuning/utils.py`: ten steps of 2/255 from a
        uniform start against the present classifier, the network in evaluation mode in the attack and in the update.
        Optimisation as published for SLF.
    """

    trains: ClassVar[Literal["all", "classifier", "adapter"]] = "classifier"
    training_attack: ClassVar[PGD] = PGD(steps=10)
    recipe: ClassVar[Mapping[str, Any]] = SLF.recipe
    citation: ClassVar[str] = """@inproceedings{luo2023rethinking,
  title     = {Rethinking the Effect of Data Augmentation in Adversarial Contrastive Learning},
  author    = {Luo, Rundong and Wang, Yifei and Wang, Yisen},
  booktitle = {International Conference on Learning Representations},
  year      = {2023}
}"""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return `{"adversarial": cross-entropy}`; see `Objective.__call__`. The batch holds `label`, int64 `(N,)`."""
        (logits,) = model([("adv", self.attack_cross_entropy(model, batch, context))])
        return {"adversarial": cross_entropy(logits, self.labels(batch))}
