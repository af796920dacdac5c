"""DynACL: ACL with an augmentation strength that decays and a weight that moves to the adversarial stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_robust.objectives.acl import ACL
from hf_robust.objectives.base import StepContext

__all__ = ["DynACL"]


@dataclass
class DynACL(ACL):
    """ACL whose augmentation strength s falls from 1 in steps, with loss weights (1 - w)/2 and (1 + w)/2.

    s(p) = 1 - floor(p / period) * period at training progress p, so 1.00, 0.95, ..., 0.05 with the published period
    of 50 of 1000 epochs; w = weight_scale (1 - s). With `ema_decay` set this is the official release: a momentum
    encoder embeds the second views (in the attack, too) and is the encoder that leaves the house. The follow-up
    releases (DynACL-AIR, DynACL-RCS) train without it, which is the default here.

    Reads with: `objectives.acl`. Stronger than ACL at no extra cost.

    Source: Luo et al. 2023; released code `train_DynACL.py` (with momentum encoder) and `DynACL_RCS.py` (without).
        We follow the paper's w = 2/3 (1 - s); `train_DynACL.py` is one notch ahead in the last epoch of each period.
    """

    take_when: ClassVar[str] = "the run is long: stronger at the price of ACL"
    citation: ClassVar[str] = """@inproceedings{luo2023dynacl,
  title     = {Rethinking the Effect of Data Augmentation in Adversarial Contrastive Learning},
  author    = {Luo, Rundong and Wang, Yifei and Wang, Yisen},
  booktitle = {International Conference on Learning Representations},
  year      = {2023}
}"""

    weight_scale: float = field(
        default=2 / 3, metadata={"help": "Lambda: the weight shift is lambda times (1 - strength); published: 2/3."}
    )
    period: float = field(
        default=0.05, metadata={"help": "Part of the training after which strength falls; published: 50/1000 epochs."}
    )
    ema_decay: None | float = field(
        default=None,
        metadata={"help": "Decay of the momentum encoder of the official DynACL release, 0.99; unset: none."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "ds":
            raise ValueError(f"DynACL re-weights two streams and needs mode 'ds', got {self.mode!r}")
        if not 0 < self.period <= 1:
            raise ValueError(f"period must be in (0, 1], got {self.period}: published runs use 50/1000 epochs = 0.05")
        if not 0 <= self.weight_scale <= 1:
            raise ValueError(f"weight_scale must be in [0, 1], got {self.weight_scale}: published is 2/3")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}: the official release uses 0.99")

    @property
    def teacher_kind(self) -> str | None:
        """`"ema"` in the official form."""
        return None if self.ema_decay is None else "ema"

    def strength(self, progress: float) -> float:
        """Augmentation strength s at a training progress; see the class."""
        # 1e-9: epoch 100 of 1000 is period 2, also where 0.1 / 0.05 rounds to 1.999...
        periods = min(math.floor(progress / self.period + 1e-9), math.ceil(1 / self.period - 1e-9) - 1)
        return 1.0 - periods * self.period

    def weights(self, progress: float) -> tuple[float, float]:
        """Clean weight (1 - w)/2 and adversarial weight (1 + w)/2."""
        shift = self.weight_scale * (1.0 - self.strength(progress))
        return ((1 - shift) / 2, (1 + shift) / 2)

    def attacked(self, model: nn.Module, context: StepContext) -> tuple[Callable[[Tensor], Tensor], ...]:
        """With a momentum encoder, the attack sees second views through it."""
        embed, partner_embed = super().attacked(model, context)
        if context.teacher is None:
            return embed, partner_embed
        teacher = context.seen(context.teacher)
        return embed, lambda images: teacher.embed(images, "adv")

    def passes(self, model: nn.Module, passes: list[tuple[str, Tensor]], context: StepContext) -> list[Tensor]:
        """With a momentum encoder, first views pass the model and second views, without gradient, the teacher."""
        if context.teacher is None:
            return super().passes(model, passes, context)
        halves = [(branch, *images.chunk(2)) for branch, images in passes]
        z_first = model([(branch, first) for branch, first, _ in halves])
        with torch.no_grad(), context.autocast():
            z_second = context.teacher([(branch, second) for branch, _, second in halves])
        return [torch.cat([first, second.to(first)]) for first, second in zip(z_first, z_second, strict=True)]
