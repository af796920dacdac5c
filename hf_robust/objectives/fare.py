"""FARE: a foundation model made robust without labels, its features on clean images kept what they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_robust.attacks import PGD
from hf_robust.distillation import mean_squared_distance
from hf_robust.objectives.base import Objective, StepContext, check_rank

__all__ = ["FARE"]


@dataclass
class FARE(Objective):
    """mean ||f(x_adv) - g(x)||^2, with the frozen original encoder g that f started from, attacked to raise the same.

    The adversarial image is pulled to where the original encoder puts the clean one. Whatever stands on these
    features (a zero-shot classifier, a language model, a retrieval index) is left as it is and goes on working.

    With `adapter_rank` the weights of f stand still, running statistics included, and low-rank adapters train in
    their place: gradients and optimiser then need memory for these only. The published learning rate is one for all
    weights; adapters, which start at zero, take more (1e-3). The exported encoder has taken them in and loads like any
    other.

    Reads with: `distillation.mean_squared_distance`, `teachers` (where g comes from), `adapters`,
    `evaluation.embedding` (the same distance, measured). Takes the place of DeACL where features are already in use;
    of pre-training from scratch (ACL, DynACL, AIR) where a good encoder exists: two epochs on any images.

    Source: Schlarmann et al. 2024, equation of section 3; RobustVLM@d257a53, `train/adversarial_training_clip.py`, on
        ViT-L/14 of CLIP and ImageNet, un-augmented, at 2/255 or 4/255. Differences: the released attack adds a
        momentum of 0.9 to the sign of the gradient, ours is plain PGD, as everywhere; the release compares features
        after CLIP's last projection, ours before it, so that any encoder will do (where these agree, their
        projections do); its weight decay acts on biases and norms, too. Adapters are ours, after Hu et al. 2022.
    """

    training_attack: ClassVar[PGD] = PGD(eps=4 / 255, step_size=1 / 255, steps=10)
    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 128,
            "optimizer": "adamw",
            "learning_rate": 1e-5,
            "weight_decay": 1e-4,
            "warmup_epochs": 0.14,
            "min_learning_rate": 0.0,
            "dataloader_drop_last": True,
        }
    )
    take_when: ClassVar[str] = "something is already built on the features, which must stay what they are"
    citation: ClassVar[str] = """@inproceedings{schlarmann2024robust,
  title     = {Robust CLIP: Unsupervised Adversarial Fine-Tuning of Vision Embeddings for \
Robust Large Vision-Language Models},
  author    = {Schlarmann, Christian and Singh, Naman Deep and Croce, Francesco and Hein, Matthias},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}"""

    augmentation: Literal["original", "padded_crop", "resized_crop"] = field(
        default="original",
        metadata={"help": "original: none, as released; padded_crop or resized_crop where images are few."},
    )
    adapter_rank: None | int = field(
        default=None,
        metadata={"help": "Train adapters of this rank, not all weights; then raise the learning rate, to 1e-3."},
    )

    def __post_init__(self) -> None:
        if self.augmentation not in ("original", "padded_crop", "resized_crop"):
            raise ValueError(
                f"augmentation must be 'original', 'padded_crop' or 'resized_crop', got {self.augmentation!r}: the "
                "published runs use 'original'"
            )
        if self.adapter_rank is not None:
            check_rank(self.adapter_rank)

    @property
    def trains(self) -> Literal["all", "adapter"]:  # type: ignore[override]
        """Adapters where they have a rank, else all weights."""
        return "all" if self.adapter_rank is None else "adapter"

    @property
    def views(self) -> tuple[str, ...]:
        """The image, un-augmented by default."""
        return (self.augmentation,)

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """One branch: no clean image passes the trained network."""
        return ("adv",)

    @property
    def head(self) -> Literal["none"]:
        """Features themselves are compared."""
        return "none"

    @property
    def teacher_kind(self) -> str:
        """The original encoder."""
        return "frozen"

    @property
    def starts_from_teacher(self) -> bool:
        """Always: the original is what it must stay."""
        return True

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return `{"adversarial": squared distance}`; see `Objective.__call__`."""
        x = batch[self.augmentation]
        with torch.no_grad(), context.autocast():
            z_teacher = context.teacher(x)
        seen = context.seen(model)

        def loss(images: Tensor) -> Tensor:
            return mean_squared_distance(seen.embed(images, "adv"), z_teacher)

        (z_adv,) = model([("adv", context.attack(loss, x))])
        return {"adversarial": mean_squared_distance(z_adv, z_teacher)}
