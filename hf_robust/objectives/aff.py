"""AFF: adversarial full fine-tuning, TRADES from a pre-trained encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hf_robust.attacks import PGD
from hf_robust.losses import trades
from hf_robust.objectives.base import StepContext, SupervisedObjective, check_beta

__all__ = ["AFF"]

Branch = Literal["clean", "adv"]


@dataclass
class AFF(SupervisedObjective):
    """CE(clean) + beta KL(p(clean) || p(adversarial)); all parameters train.

    Adversarial images pass the branch `"adv"`, through which the classifier is used afterwards. Two fields say where
    clean images go: in the loss (`clean_branch`) and as constant reference of the attack (`reference_branch`). Both
    `"clean"`, the default, is the published fine-tuning with two norm branches; both `"adv"` the one with a single
    branch; `clean_branch="adv"` with `reference_branch="clean"` the post-processing of AIR (LP-AFF), whose clean
    branch is never trained.

    Reads with: `losses.trades`, `attacks.PGD` (`start_std`). The strongest fine-tuning where the whole encoder may
    change; AutoLoRa sets its weights by itself.

    Source: Zhang et al. 2019 (TRADES); RobustSSL_Benchmark@19dc714, `Finetuning_Methods/Vanilla_Finetuning/utils.py`.
        Attack in evaluation mode, started at Gaussian noise of 0.001; loss in train mode, clean images first; gradient
        through both arguments of the divergence. Enhancing_ACL_via_AIR@15cf0a7, `LP-AFF.py` (post-processing).
    """

    training_attack: ClassVar[PGD] = PGD(steps=10, start_std=0.001)
    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "per_device_train_batch_size": 128,
            "learning_rate": 0.1,
            "lr_milestones": [15, 20],
            "num_train_epochs": 25,
            "weight_decay": 2e-4,
            "momentum": 0.9,
            "optimizer": "sgd",
            "nesterov": False,
            "warmup_epochs": 0.0,
        }
    )
    citation: ClassVar[str] = """@inproceedings{zhang2019theoretically,
  title     = {Theoretically Principled Trade-off between Robustness and Accuracy},
  author    = {Zhang, H. and Yu, Y. and Jiao, J. and Xing, E. P. and El Ghaoui, L. and Jordan, M. I.},
  booktitle = {International Conference on Machine Learning},
  year      = {2019}
}"""

    beta: float = field(default=6.0, metadata={"help": "Weight of the divergence; published: 6."})
    clean_branch: Branch = field(
        default="clean", metadata={"help": "Norm branch of clean images in the loss; adv: one branch for all."}
    )
    reference_branch: Branch = field(
        default="clean", metadata={"help": "Norm branch of clean images in the attack; adv: one branch for all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_beta(self.beta)
        for name in ("clean_branch", "reference_branch"):
            if getattr(self, name) not in ("clean", "adv"):
                raise ValueError(
                    f"{name} must be 'clean' or 'adv', got {getattr(self, name)!r}: 'clean' for encoders with two "
                    "norm branches, 'adv' for those with one"
                )

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """`("adv",)` when no clean image passes the clean branch; both otherwise."""
        return ("clean", "adv") if "clean" in (self.clean_branch, self.reference_branch) else ("adv",)

    @property
    def idle_branches(self) -> tuple[str, ...]:
        """`("clean",)` when only the attack looks through the clean branch."""
        return tuple(b for b in self.norm_branches if b not in (self.clean_branch, "adv"))

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return the terms `clean` and `kl`; see `Objective.__call__`. The batch holds `label`, int64 `(N,)`."""
        labels = self.labels(batch)
        x_adv = self.attack_divergence(model, batch, context, self.reference_branch)
        logits, logits_adv = model([(self.clean_branch, batch[self.augmentation]), ("adv", x_adv)])
        clean, kl = trades(logits, logits_adv, labels, self.beta)
        return {"clean": clean, "kl": kl}
