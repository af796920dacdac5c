"""AdvCL: contrast of an adversarial, two random and a high-frequency view, and pseudo-labels under attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_robust.losses import cross_entropy, gather
from hf_robust.multiview_losses import supcon
from hf_robust.objectives.base import Objective, StepContext, check_temperature

__all__ = ["AdvCL"]

Contrast = Callable[[Sequence[Tensor]], Tensor]
_CLEAN = ("view_1", "view_2", "high_frequency")  # contrasted with the adversarial view, in the released order


@dataclass
class AdvCL(Objective):
    """SupCon over four views, one of them adversarial, plus cross-entropy of cluster pseudo-labels under attack.

    With w the shifted and flipped image, t1 and t2 two random views and h the high frequencies of w:

        L = SupCon(x_cl | adv, t1 | clean, t2 | clean, h | clean) + lambda mean over K of CE(head_K(x_ce | adv_ce))

    where `| branch` names the norm branch of the encoder. x_cl and x_ce are two images in the ball around w, attacked
    separately: x_cl raises the contrast, x_ce the cross-entropy. SupCon has temperature T and the factor T / T0, with
    the published 0.5 and 0.07 a factor 7.14: relative to a plain contrastive loss lambda = 0.2 weighs 0.028. Each head
    is one linear layer on the features; the labels are k-means clusters of the features of another encoder, computed
    once before training (`hf_robust.pseudo_labels`). The projector has one norm layer, which all branches share. The
    branch that leaves the house is `adv`, as published; `adv_ce` and the heads stay.

    `formulation` says how the network stands while it is attacked:

    - `"released"`: in train mode. Its norms use the statistics of the attacked batch, and their running statistics
      move with every step of the attack: after a step of a 5-step attack those of `clean` carry 1 - 0.9^18 of this
      batch, and those of `adv` hold the iterates, too. This produced the published numbers, the exported statistics
      included, and is the default.
    - `"fixed"`: in evaluation mode, as every other method here: an attack on the network that leaves the house, which
      changes nothing, and in which the three clean views are embedded once instead of in every step.

    Reads with: `objectives.acl`, `multiview_losses.supcon`, `pseudo_labels`, `frequencies.high_pass`. Better than ACL
    for linear fine-tuning, if a good encoder is at hand for the labels: published ones came from ImageNet, which other
    methods have not seen. Without one, clusters of the untrained network teach little: use ACL or DynACL.

    Source: Fan et al. 2021; released code `pretraining_advCL.py` and `models/resnet_cifar_multibn_ensembleFC.py`,
        whose order of the train-mode passes we keep. Differs: it also sends x_ce through the projector and drops the
        result, which moves the running statistics of the shared norm; the predictor and the second head are unused
        and left out. It trains on raw pixels, by DataParallel with the statistics of each GPU.
    """

    take_when: ClassVar[str] = (
        "a good encoder is at hand whose clusters can serve as labels, and a linear classifier will stand on top"
    )
    citation: ClassVar[str] = """@inproceedings{fan2021does,
  title     = {When Does Contrastive Learning Preserve Adversarial Robustness from Pretraining to Finetuning?},
  author    = {Fan, Lijie and Liu, Sijia and Chen, Pin-Yu and Zhang, Gaoyuan and Gan, Chuang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021}
}"""
    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "optimizer": "sgd",
            "learning_rate": 0.5,
            "nesterov": False,
            "weight_decay": 1e-4,
            "min_learning_rate": 5e-4,
        }
    )
    adversarial_views: ClassVar[tuple[int, ...]] = (0,)

    temperature: float = field(default=0.5, metadata={"help": "Temperature T of the contrast; published: 0.5."})
    base_temperature: float = field(
        default=0.07, metadata={"help": "T0: the contrast is multiplied by T / T0; published: 0.07, a factor 7.14."}
    )
    pseudo_label_weight: float = field(
        default=0.2, metadata={"help": "Lambda: weight of the mean cross-entropy of the heads; published: 0.2."}
    )
    clusters: list[int] = field(
        default_factory=lambda: [2, 10, 50, 100, 500],
        metadata={"help": "Numbers of clusters of the pseudo-labels, a head each; published: 2 10 50 100 500."},
    )
    formulation: Literal["released", "fixed"] = field(
        default="released",
        metadata={"help": "released: attack in train mode, which moves running statistics; fixed: evaluation mode."},
    )

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if not self.base_temperature > 0:
            raise ValueError(f"base_temperature must be positive, got {self.base_temperature}: published is 0.07")
        if not self.pseudo_label_weight > 0:
            raise ValueError(
                f"pseudo_label_weight must be positive, got {self.pseudo_label_weight}: published is 0.2; train ACL "
                "for contrast alone"
            )
        if self.formulation not in ("released", "fixed"):
            raise ValueError(f"formulation must be 'released' or 'fixed', got {self.formulation!r}")
        self.clusters = list(self.clusters)
        if not self.clusters or sorted(set(self.clusters)) != self.clusters or self.clusters[0] < 2:
            raise ValueError(
                f"clusters must be rising numbers, 2 or more each, got {self.clusters}: published are 2 10 50 100 500"
            )

    @property
    def views(self) -> tuple[str, ...]:
        """Two random views, the shifted and flipped image that is attacked, and its high frequencies."""
        return ("view_1", "view_2", "padded_crop", "high_frequency")

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """One for clean views, and one for each attack."""
        return ("clean", "adv", "adv_ce")

    @property
    def network(self) -> Mapping[str, Any]:
        """Projector of two layers with one shared norm, a linear head per clustering, raw pixels."""
        return {
            "projector_layers": 2,
            "projector_dim": 128,
            "projector_norms": "hidden",
            "projector_norm_branches": "shared",
            "branch_heads": {"adv_ce": list(self.clusters)},
            "mean": None,
            "std": None,
        }

    @property
    def view_options(self) -> Mapping[str, Any]:
        """Crops of a fifth of the area or more."""
        return {"minimal_area": 0.2}

    @property
    def pseudo_classes(self) -> tuple[int, ...]:
        """Numbers of clusters."""
        return tuple(self.clusters)

    @property
    def attack_in_eval_mode(self) -> bool:
        """No in the released formulation."""
        return self.formulation == "fixed"

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return the terms `contrastive` and `pseudo_labels`; see `Objective.__call__`.

        The batch holds the views and, for each K, `pseudo_label_K`, int64 `(N,)`.
        """
        return self.terms(model, batch, context, self.contrast)

    def terms(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        context: StepContext,
        contrast: Contrast,
        attack_contrast: Contrast | None = None,
    ) -> dict[str, Tensor]:
        """The loss terms with another contrast of the four views, for methods that stand on this one.

        Args:
            model, batch, context: as in `Objective.__call__`.
            contrast (`Callable[[Sequence[Tensor]], Tensor]`): scalar of the embeddings `(N, P)` of the adversarial
                view, view 1, view 2 and the high-frequency view, not gathered.
            attack_contrast (`Callable`, *optional*): what the attack raises; default: `contrast`.

        Returns:
            `dict[str, torch.Tensor]`: `contrastive` and `pseudo_labels`.
        """
        x_cl, x_ce = self._attack_twice(model, batch, context, attack_contrast or contrast)
        clean = [("clean", batch[name]) for name in _CLEAN]
        z_adv, logits, *z_clean = model([("adv", x_cl), ("adv_ce", x_ce), *clean])
        return {
            "contrastive": contrast([z_adv, *z_clean]),
            "pseudo_labels": self.pseudo_label_weight * self.pseudo_label_loss(logits, batch),
        }

    def contrast(self, views: Sequence[Tensor], **options: Any) -> Tensor:
        """SupCon times T / T0 of embeddings `(N, P)` per view, over all processes; see the class.

        Args:
            views (`Sequence[torch.Tensor]`): two or more embeddings `(N, P)`, not gathered.
            options: `pairs` and `hard_negatives` of `multiview_losses.supcon`.

        Returns:
            `torch.Tensor` of shape `()`.
        """
        gathered = [gather(z) for z in views]
        return supcon(gathered, temperature=self.temperature, base_temperature=self.base_temperature, **options)

    def pseudo_label_loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean over the numbers of clusters of the cross-entropy of their head.

        Args:
            logits (`torch.Tensor` of shape `(N, sum of clusters)`): of all heads, side by side.
            batch (`dict[str, torch.Tensor]`): as in `__call__`.

        Returns:
            `torch.Tensor` of shape `()`.

        Raises:
            ValueError: for a batch without the labels.
        """
        missing = [f"pseudo_label_{k}" for k in self.clusters if f"pseudo_label_{k}" not in batch]
        if missing:
            raise ValueError(
                f"{self.title} needs {', '.join(missing)}, got a batch with {', '.join(batch)}: train by "
                "RobustPretrainer, which makes them (hf_robust.pseudo_labels)"
            )
        parts = zip(logits.split(self.clusters, dim=1), self.clusters, strict=True)
        return torch.stack([cross_entropy(part, batch[f"pseudo_label_{k}"]) for part, k in parts]).mean()

    def _attack_twice(
        self, model: nn.Module, batch: dict[str, Tensor], context: StepContext, contrast: Contrast
    ) -> tuple[Tensor, Tensor]:
        """The shifted image attacked to raise the contrast, and attacked to raise the cross-entropy of its labels.

        Both are halves of one attacked tensor whose loss is the sum, as released. No gradient crosses from one to the
        other, and a step goes by the sign (or by the norm of each image), so that they are two separate attacks.
        """
        seen, clean = context.seen(model), [batch[name] for name in _CLEAN]
        constant: list[Tensor] = []

        def loss(images: Tensor) -> Tensor:
            x_cl, x_ce = images.chunk(2)
            z_adv, logits = seen.embed(x_cl, "adv"), seen.embed(x_ce, "adv_ce")
            if not constant or not self.attack_in_eval_mode:  # in train mode they move running statistics every time
                with torch.no_grad():
                    constant[:] = [seen.embed(view, "clean") for view in clean]
            return contrast([z_adv, *constant]) + self.pseudo_label_loss(logits, batch)

        x_cl, x_ce = context.attack(loss, torch.cat([batch["padded_crop"]] * 2)).chunk(2)
        return x_cl, x_ce
