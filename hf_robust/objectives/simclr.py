"""SimCLR: the non-robust baseline, and the contrast every robust encoder is shown against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_robust.losses import gather, nt_xent
from hf_robust.objectives.base import Objective, StepContext, check_temperature

__all__ = ["SimCLR"]


@dataclass
class SimCLR(Objective):
    """NT-Xent between two clean views (called S2S in the ACL paper). No attack, one norm branch.

    Reads with: `losses.nt_xent`.

    Source: Chen et al. 2020; Jiang et al. 2020, mode S2S.
    """

    take_when: ClassVar[str] = "you want the non-robust baseline, or a teacher for DeACL and FARE"
    citation: ClassVar[str] = """@inproceedings{chen2020simclr,
  title     = {A Simple Framework for Contrastive Learning of Visual Representations},
  author    = {Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey},
  booktitle = {International Conference on Machine Learning},
  year      = {2020}
}"""

    temperature: float = field(default=0.5, metadata={"help": "Temperature of the contrastive loss; published: 0.5."})

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """One branch: there are no adversarial images."""
        return ("clean",)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return `{"clean": nt_xent}`; see `Objective.__call__`."""
        (z,) = model([("clean", torch.cat([batch["view_1"], batch["view_2"]]))])
        z_i, z_j = z.chunk(2)
        return {"clean": nt_xent(gather(z_i), gather(z_j), self.temperature)}
