"""SAT: supervised adversarial training, the robust classifier whose backbone becomes an encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hf_robust.objectives.base import Objective, StepContext, unwrapped

__all__ = ["SAT"]


@dataclass
class SAT(Objective):
    """Cross-entropy on adversarial images that were attacked to raise it, through one norm branch.

    The loss is a mean over the images of this process. Nothing is gathered: with equal shares on all processes, the
    average that DistributedDataParallel takes of the gradients is the gradient of the global mean.

    Reads with: `attacks.PGD`, `models.modeling` (`head="classifier"`). Takes the place of the contrastive methods
    where the pre-training images have labels.

    Source: Madry et al. 2018; released code `SAT_RCS.py` of the coreset method RCS. Attack in evaluation mode, loss in
        train mode; the release also clips the random start of the attack to [0, 1], ours its steps only. Published
        runs: batch 256, SGD with learning rate 0.1 and Nesterov momentum 0.9. ImageNet-32 (WRN-28-10, padded_crop):
        PGD-10 of 2/255 at 8/255, weight decay 5e-4. ImageNet-224 (ResNet-50, resized_crop): 3 steps of 2/3 eps at
        4/255, weight decay 1e-4.
    """

    needs_labels: ClassVar[bool] = True
    citation: ClassVar[str] = """@inproceedings{madry2018towards,
  title     = {Towards Deep Learning Models Resistant to Adversarial Attacks},
  author    = {Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
  booktitle = {International Conference on Learning Representations},
  year      = {2018}
}"""

    augmentation: Literal["padded_crop", "resized_crop"] = field(
        default="padded_crop",
        metadata={"help": "padded_crop: shifted crop and flip, for small images; resized_crop: published at 224."},
    )

    def __post_init__(self) -> None:
        if self.augmentation not in ("padded_crop", "resized_crop"):
            raise ValueError(
                f"augmentation must be 'padded_crop' or 'resized_crop', got {self.augmentation!r}: published runs use "
                "'padded_crop' at 32 pixels and 'resized_crop' at 224"
            )

    @property
    def title(self) -> str:
        """`SAT`."""
        return "SAT"

    @property
    def views(self) -> tuple[str, ...]:
        """The augmented image."""
        return (self.augmentation,)

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """One branch: no clean image passes the network."""
        return ("adv",)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return `{"adversarial": cross-entropy}`; see `Objective.__call__`. The batch holds `label`, int64 `(N,)`."""
        labels = _labels(batch)
        (logits,) = model([("adv", self._attack(model, batch, context))])
        return {"adversarial": _cross_entropy(logits, labels).mean()}

    def candidate_passes(
        self, model: nn.Module, batch: dict[str, Tensor], context: StepContext
    ) -> list[tuple[str, Tensor]]:
        """Adversarial images through `adv`; see `Objective`."""
        return [("adv", self._attack(model, batch, context))]

    def candidate_losses(self, outputs: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of every adversarial image; see `Objective`."""
        return _cross_entropy(outputs[0], _labels(batch))

    def _attack(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> Tensor:
        module, labels = unwrapped(model), _labels(batch)

        def loss(images: Tensor) -> Tensor:
            return _cross_entropy(module.embed(images, "adv"), labels).mean()

        return context.attack(loss, batch[self.augmentation])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per image, in float32 at least: a loss in bf16 would keep two digits."""
    return F.cross_entropy(logits if logits.element_size() > 4 else logits.float(), labels, reduction="none")


def _labels(batch: dict[str, Tensor]) -> Tensor:
    if "label" not in batch:
        raise ValueError(
            f"SAT needs labels, got a batch with {', '.join(batch)}: name the label column of the data set, or train "
            "without labels (ACL, DynACL, AIR)"
        )
    return batch["label"]
