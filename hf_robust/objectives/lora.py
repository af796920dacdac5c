"""LoRA: adversarial fine-tuning of low-rank adapters, for encoders too large to be fine-tuned or copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hf_robust.attacks import PGD
from hf_robust.losses import trades
from hf_robust.objectives.base import StepContext, SupervisedObjective, check_beta, check_rank

__all__ = ["LoRA"]


@dataclass
class LoRA(SupervisedObjective):
    """CE(clean) + beta KL(p(clean) || p(adversarial)); the adapters and the classifier train, the encoder does not.

    All images pass one network, adapters on. The encoder stays in evaluation mode: what is learnt is the adapters and
    the classifier, a few MB that anybody can put on the same encoder.

    Reads with: `adapters` (which layers are adapted), `objectives.aff` (the same loss on all parameters). Not
    AutoLoRa, which trains the whole encoder and throws its adapters away.

    Source: Hu et al. 2022 (low-rank adapters), Zhang et al. 2019 (loss). No published robust recipe: attack and
        schedule as for AFF, AdamW with 0.001 as usual for adapters, both ours.
    """

    trains: ClassVar[Literal["all", "classifier", "adapter"]] = "adapter"
    training_attack: ClassVar[PGD] = PGD(steps=10, start_std=0.001)
    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "per_device_train_batch_size": 128,
            "learning_rate": 1e-3,
            "lr_milestones": [15, 20],
            "num_train_epochs": 25,
            "weight_decay": 2e-4,
            "optimizer": "adamw",
            "warmup_epochs": 0.0,
        }
    )
    citation: ClassVar[str] = """@inproceedings{hu2022lora,
  title     = {LoRA: Low-Rank Adaptation of Large Language Models},
  author    = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and others},
  booktitle = {International Conference on Learning Representations},
  year      = {2022}
}"""

    beta: float = field(default=6.0, metadata={"help": "Weight of the divergence; published for TRADES: 6."})
    rank: int = field(default=8, metadata={"help": "Rank of the adapters; 8, as usual."})
    alpha: None | float = field(
        default=None, metadata={"help": "Adapters are scaled by alpha / rank; unset: the rank, a scale of 1."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_beta(self.beta)
        check_rank(self.rank)
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive, got {self.alpha}: leave it out for a scale of 1")

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return the terms `clean` and `kl`; see `Objective.__call__`. The batch holds `label`, int64 `(N,)`."""
        labels = self.labels(batch)
        x_adv = self.attack_divergence(model, batch, context, "adv")
        logits, logits_adv = model([("adv", batch[self.augmentation]), ("adv", x_adv)])
        clean, kl = trades(logits, logits_adv, labels, self.beta)
        return {"clean": clean, "kl": kl}
