"""DeACL: a standard self-supervised encoder teaches a robust one, in a tenth of the epochs of contrastive methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_robust.distillation import deacl_terms, mean_cosine
from hf_robust.objectives.base import Objective, StepContext

__all__ = ["DeACL"]


@dataclass
class DeACL(Objective):
    """-mean cos(f(w), g(w)) - 2 mean cos(f(x_adv), f(w)), with a frozen teacher g and one weak view w per image.

    The two stages that ACL trains together are separated: what to represent is learnt by ordinary self-supervision
    (any encoder will do), and only then robustness, by adversarial training towards the teacher's features. The attack
    raises -sum cos(f(x'), g(w)) with f in evaluation mode. No gradient is stopped at f(w), and clean and adversarial
    images share one train-mode pass, so that running statistics mix both.

    Reads with: `distillation.deacl_terms`, `teachers` (where g comes from). Takes the place of ACL, DynACL and AIR
    where an encoder exists already or there is little time: 100 epochs of five attack steps on one view each. FARE is
    the choice where the features themselves must stay what they were, because something is already built on them.

    Source: Zhang et al. 2022; DeACL@3fb81e3, `solo/methods/mocov2_distillation_AT.py`, which is followed. Its random
        start is not clipped, its steps are. Two differences: its stem pads the image by two pixels (34 x 34 feature
        maps), ours by one like every other method's; its linear classifier with true labels, which trains beside on
        detached features, is left out.
    """

    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "num_train_epochs": 100,
            "per_device_train_batch_size": 256,
            "optimizer": "sgd",
            "learning_rate": 0.5,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 5e-4,
            "warmup_epochs": 10,
            "min_learning_rate": 0.0,
            "lr_granularity": "epoch",
            "dataloader_drop_last": True,
        }
    )
    take_when: ClassVar[str] = "an encoder exists already, or time is short"
    citation: ClassVar[str] = """@inproceedings{zhang2022decoupled,
  title     = {Decoupled Adversarial Contrastive Learning for Self-supervised Adversarial Robustness},
  author    = {Zhang, Chaoning and Zhang, Kang and Zhang, Chenshuang and Niu, Axi and Feng, Jiu and others},
  booktitle = {European Conference on Computer Vision},
  year      = {2022}
}"""

    clean_branch: ClassVar[str] = "adv"

    adversarial_weight: float = field(
        default=2.0, metadata={"help": "Weight of the adversarial term; released: 2 (trades_k)."}
    )
    student_scratch: bool = field(
        default=False, metadata={"help": "Begin at random weights instead of the teacher's (released: the teacher's)."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.adversarial_weight < float("inf"):
            raise ValueError(
                f"adversarial_weight must be positive, got {self.adversarial_weight}: the released value is 2"
            )

    @property
    def views(self) -> tuple[str, ...]:
        """One weak view: shifted crop and flip."""
        return ("padded_crop",)

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """One branch, for clean and adversarial images."""
        return ("adv",)

    @property
    def head(self) -> Literal["none"]:
        """Features themselves are compared."""
        return "none"

    @property
    def teacher_kind(self) -> str:
        """An encoder that never changes."""
        return "frozen"

    @property
    def starts_from_teacher(self) -> bool:
        """Unless `student_scratch`."""
        return not self.student_scratch

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return the terms `clean` and `adversarial`; see `Objective.__call__`."""
        x = batch["padded_crop"]
        with torch.no_grad(), context.autocast():
            z_teacher = context.teacher(x)
        seen = context.seen(model)

        def loss(images: Tensor) -> Tensor:
            return -len(x) * mean_cosine(seen.embed(images, "adv"), z_teacher)

        x_adv = context.attack(loss, x)
        (both,) = model([("adv", torch.cat([x, x_adv]))])
        z, z_adv = both.chunk(2)
        clean, adversarial = deacl_terms(z, z_adv, z_teacher, self.adversarial_weight)
        return {"clean": clean, "adversarial": adversarial}
