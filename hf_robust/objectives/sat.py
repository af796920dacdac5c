"""SAT: supervised adversarial training, the robust classifier whose backbone becomes an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hf_robust.losses import cross_entropy
from hf_robust.objectives.base import StepContext, SupervisedObjective

__all__ = ["SAT"]


@dataclass
class SAT(SupervisedObjective):
    """Cross-entropy on adversarial images that were attacked to raise it, through one norm branch.

    Reads with: `attacks.PGD`, `models.modeling` (`head="classifier"`). Takes the place of the contrastive methods
    where the pre-training images have labels.

    Source: Madry et al. 2018; released code `SAT_RCS.py` of the coreset method RCS. Attack in evaluation mode, loss in
        train mode; the release also clips the random start of the attack to [0, 1], ours its steps only. Published
        runs: batch 256, SGD with learning rate 0.1 and Nesterov momentum 0.9. ImageNet-32 (WRN-28-10, padded_crop):
        PGD-10 of 2/255 at 8/255, weight decay 5e-4. ImageNet-224 (ResNet-50, resized_crop): 3 steps of 2/3 eps at
        4/255, weight decay 1e-4.
    """

    take_when: ClassVar[str] = "the images have labels"
    citation: ClassVar[str] = """@inproceedings{madry2018towards,
  title     = {Towards Deep Learning Models Resistant to Adversarial Attacks},
  author    = {Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
  booktitle = {International Conference on Learning Representations},
  year      = {2018}
}"""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return `{"adversarial": cross-entropy}`; see `Objective.__call__`. The batch holds `label`, int64 `(N,)`."""
        (logits,) = model([("adv", self.attack_cross_entropy(model, batch, context))])
        return {"adversarial": cross_entropy(logits, self.labels(batch))}

    def candidate_passes(
        self, model: nn.Module, batch: dict[str, Tensor], context: StepContext
    ) -> list[tuple[str, Tensor]]:
        """Adversarial images through `adv`; see `Objective`."""
        return [("adv", self.attack_cross_entropy(model, batch, context))]

    def candidate_losses(self, outputs: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of every adversarial image; see `Objective`."""
        return cross_entropy(outputs[0], self.labels(batch), reduction="none")
