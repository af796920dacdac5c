"""AIR: adversarial invariant regularisation on top of ACL or DynACL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_robust.losses import gather, invariance_terms
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.base import Objective, StepContext

__all__ = ["AIR"]


@dataclass
class AIR(Objective):
    """Base loss plus a standard and a robust invariance term that tie views to the un-augmented image.

    Total, as released: (1 - w) clean + (1 + w) adversarial + lambda1 standard + lambda2 robust, without the factor
    1/2 of ACL; w = 0 on ACL and DynACL's shift on DynACL. The attack maximises the base's contrastive loss only.
    The un-augmented images take a third train-mode pass of their own through the clean branch, with gradient.

    Reads with: `objectives.acl`, `objectives.dynacl`, `losses.invariance_terms`. ACL-AIR is `AIR()`, DynACL-AIR is
    `AIR(base=DynACL())`.

    Source: Xu et al. 2023; released code `AIR.py`, `pretraining.py`. `formulation="released"` is what produced the
        published numbers; `"paper"` takes the two KL divergences of the paper, at the same scale (the paper sums the
        contrastive loss over anchors where the code averages, which would make the regularisers 2N times lighter).
    """

    take_when: ClassVar[str] = "the encoder will be used on other data, for one more clean pass per step"
    citation: ClassVar[str] = """@inproceedings{xu2023air,
  title     = {Enhancing Adversarial Contrastive Learning via Adversarial Invariant Regularization},
  author    = {Xu, Xilie and Zhang, Jingfeng and Liu, Feng and Sugiyama, Masashi and Kankanhalli, Mohan},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}"""

    base: ACL = field(default_factory=ACL, metadata={"help": "Method that AIR regularises: acl or dynacl."})
    lambda1: float = field(default=0.5, metadata={"help": "Weight of the standard term; published: 0.5."})
    lambda2: float = field(default=0.5, metadata={"help": "Weight of the robust term; published: 0.5."})
    formulation: Literal["released", "paper"] = field(
        default="released", metadata={"help": "released: what produced the published numbers; paper: its equations."}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.base, ACL) or self.base.mode != "ds":
            raise ValueError(
                f"AIR needs a base with a clean and an adversarial stream (ACL or DynACL), got {self.base}"
            )
        if self.base.teacher_kind is not None:
            raise ValueError("AIR is defined without a momentum encoder: leave ema_decay of its base unset")
        if self.formulation not in ("released", "paper"):
            raise ValueError(f"formulation must be 'released' or 'paper', got {self.formulation!r}")
        for name, value in (("lambda1", self.lambda1), ("lambda2", self.lambda2)):
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}: published is 0.5")

    @property
    def views(self) -> tuple[str, ...]:
        """Two random views and the un-augmented image."""
        return ("view_1", "view_2", "original")

    @property
    def title(self) -> str:
        """`ACL-AIR` or `DynACL-AIR`."""
        return f"{self.base.title}-AIR"

    def strength(self, progress: float) -> float:
        """Augmentation strength of the base."""
        return self.base.strength(progress)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return the terms `clean`, `adversarial`, `standard_invariance`, `robust_invariance`."""
        x = torch.cat([batch["view_1"], batch["view_2"]])
        x_adv = context.attack(self.base.pair_loss(*self.base.attacked(model, context)), x)
        z_adv, z, z_original = model([("adv", x_adv), ("clean", x), ("clean", batch["original"])])
        z_i, z_j, z_i_adv, z_j_adv = (gather(part) for part in (*z.chunk(2), *z_adv.chunk(2)))
        standard, robust = invariance_terms(
            z_i, z_j, gather(z_original), z_i_adv, z_j_adv, self.base.temperature, self.formulation
        )
        clean_weight, adversarial_weight = (2 * weight for weight in self.base.weights(context.progress))
        return {
            "clean": clean_weight * self.base.contrast(z),
            "adversarial": adversarial_weight * self.base.contrast(z_adv),
            "standard_invariance": self.lambda1 * standard,
            "robust_invariance": self.lambda2 * robust,
        }

    def candidate_passes(
        self, model: nn.Module, batch: dict[str, Tensor], context: StepContext
    ) -> list[tuple[str, Tensor]]:
        """Those of the base: coreset selection scores the contrastive loss alone; see `Objective`."""
        return self.base.candidate_passes(model, batch, context)

    def candidate_losses(self, outputs: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Those of the base; see `Objective`."""
        return self.base.candidate_losses(outputs, batch)
