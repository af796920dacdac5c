"""A-InfoNCE: adversarial views as inferior positives and as hard negatives, on RoCL, AdvCL or ACL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hf_robust.attacks import PGD, LossFn, frozen
from hf_robust.losses import gather
from hf_robust.multiview_losses import HardNegatives, PairRule, adversarial_anchors, inferior_positives, supcon
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.advcl import AdvCL
from hf_robust.objectives.base import Objective, StepContext, unwrapped
from hf_robust.objectives.rocl import RoCL

__all__ = ["AInfoNCE"]

_Variant = Literal["ip", "hn", "iphn"]


@dataclass
class AInfoNCE(Objective):
    """Contrastive term of a host method in which adversarial views count otherwise than clean ones.

    - `"ip"`, inferior positives: an adversarial and a clean view pull each other by
      2 weight (sigma l(clean -> adversarial) + (1 - sigma) l(adversarial -> clean)), keys detached. sigma = 1/2 is the
      symmetric loss, sigma = 0 lets clean embeddings alone: see `multiview_losses.inferior_positives`.
    - `"hn"`, hard negatives: negatives that are more similar weigh more, and the share `tau_plus` of them that shows
      the anchor's class is taken off: see `multiview_losses.HardNegatives`.
    - `"iphn"`: both.

    With `sigma_warmup` above 0, sigma follows the attack. d is the mean distance of pooled features of the attacked
    images and of their originals, both through the branch of clean images, and D the mean of d over the first part
    `sigma_warmup` of the training. From then on sigma stays where d > D, is 1/2 where d < `minimal_distance`, and goes
    linearly between; D is kept in the checkpoints. Every step then waits for one number of the accelerator.

    Hosts: RoCL and AdvCL as published; everything else is theirs, the attack included. On ACL and DynACL, which never
    contrast a clean with an adversarial view, this is our reading: `"ip"` adds a term that does so, the mean over the
    four pairs of such views, with all four as keys (so weight = 0 is ACL); `"hn"` weighs the negatives in each term.

    `infonce_formulation="fixed"` follows the equations. `"released"` follows the code on RoCL and AdvCL, which
    published numbers come from: other denominators of the hard negatives (see there), and on AdvCL the terms
    l(clean -> adversarial) replaced by l(adversarial -> clean) in every attack and, without inferior positives, in the
    loss (`multiview_losses.adversarial_anchors`). In neither do the passes that measure d move running statistics,
    which they do in the code, and the attack of `"hn"` never weighs negatives (`--attack_ori` of the published runs).

    Reads with: `objectives.rocl`, `objectives.advcl`, `objectives.acl`, `multiview_losses`. Better than its host where
    clean accuracy suffers from the attack; costs nothing but, with `sigma_warmup`, 2N forward passes.

    Source: Yu et al. 2022; A-InfoNCE@b28763e, `Asym-AdvCL/losses.py`, `Asym-AdvCL/pretraining_advCL.py`,
        `Asym-RoCL/loss.py`. The RoCL code leaves the 2 of the pairs out: its published weight 1 is `pair_weight` 0.5.
    """

    take_when: ClassVar[str] = "clean accuracy suffers from the attack of the host method"
    citation: ClassVar[str] = """@inproceedings{yu2022adversarial,
  title     = {Adversarial Contrastive Learning via Asymmetric {InfoNCE}},
  author    = {Yu, Qiying and Lou, Jieming and Zhan, Xianyuan and Li, Qizhang and Zuo, Wangmeng and others},
  booktitle = {European Conference on Computer Vision},
  year      = {2022}
}"""

    base: Objective = field(default_factory=ACL, metadata={"help": "Host method: acl, dynacl, rocl or advcl."})
    variant: _Variant = field(
        default="ip", metadata={"help": "ip: inferior positives; hn: hard negatives; iphn: both."}
    )
    sigma: float = field(
        default=0.2, metadata={"help": "Share of the pull on clean embeddings; published: 0.2, 0.3 on CIFAR-100."}
    )
    pair_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of clean-adversarial pairs; published: 0.7 to 1.5 on AdvCL, 0.5 on RoCL."},
    )
    sigma_warmup: float = field(
        default=0.0,
        metadata={"help": "Part of the training before sigma follows the attack; 0: never. On AdvCL: 30/400 epochs."},
    )
    minimal_distance: float = field(
        default=0.4, metadata={"help": "Distance of features below which sigma is 1/2; published: 0.4 on CIFAR-10."}
    )
    beta: float = field(default=1.0, metadata={"help": "Concentration on hard negatives; published: 1."})
    tau_plus: float = field(
        default=0.1, metadata={"help": "Share of negatives of the anchor's class; published: 0.1, 0.12 on CIFAR-10."}
    )
    infonce_formulation: Literal["fixed", "released"] = field(
        default="fixed", metadata={"help": "fixed: the equations; released: what the code does, on rocl and advcl."}
    )

    def __post_init__(self) -> None:
        self._check_base()
        if self.variant not in get_args(_Variant):
            raise ValueError(f"variant must be one of {', '.join(get_args(_Variant))}, got {self.variant!r}")
        if not 0 <= self.sigma_warmup <= 1:
            raise ValueError(
                f"sigma_warmup must be in [0, 1], got {self.sigma_warmup}: published are 30/400 epochs = 0.075; 0 "
                "leaves sigma constant"
            )
        if not self.minimal_distance >= 0:
            raise ValueError(f"minimal_distance must be 0 or more, got {self.minimal_distance}: published is 0.4")
        inferior_positives(2, (1,), self.sigma, self.pair_weight)  # both refuse what is out of range
        HardNegatives(self.beta, self.tau_plus)

    def _check_base(self) -> None:
        hosts = isinstance(self.base, RoCL | AdvCL) or (isinstance(self.base, ACL) and self.base.mode == "ds")
        if not hosts:
            raise ValueError(f"A-InfoNCE stands on RoCL, AdvCL, or ACL and DynACL in mode 'ds', got {self.base}")
        if self.base.teacher_kind is not None:
            raise ValueError("A-InfoNCE is defined without a momentum encoder: leave ema_decay of its base unset")
        if self.infonce_formulation not in ("fixed", "released"):
            raise ValueError(f"infonce_formulation must be 'fixed' or 'released', got {self.infonce_formulation!r}")
        if self.infonce_formulation == "released" and isinstance(self.base, ACL):
            raise ValueError(
                f"there is no released code on {self.base.title}: write infonce_formulation='fixed', or base rocl or "
                "advcl"
            )

    # ------------------------------------------------------------------ what the host declares
    @property
    def views(self) -> tuple[str, ...]:
        """Those of the host."""
        return self.base.views

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """Those of the host."""
        return self.base.norm_branches

    @property
    def network(self) -> Mapping[str, Any]:
        """That of the host."""
        return self.base.network

    @property
    def view_options(self) -> Mapping[str, Any]:
        """Those of the host."""
        return self.base.view_options

    @property
    def training_attack(self) -> PGD:  # type: ignore[override]
        """That of the host."""
        return self.base.training_attack

    @property
    def pseudo_classes(self) -> tuple[int, ...]:
        """Those of the host."""
        return self.base.pseudo_classes

    @property
    def attack_in_eval_mode(self) -> bool:
        """As the host."""
        return self.base.attack_in_eval_mode

    @property
    def clean_branch(self) -> str:
        """Branch of clean images: the only one of RoCL."""
        return "clean" if "clean" in self.norm_branches else "adv"

    @property
    def title(self) -> str:
        """`AdvCL-IP`, `RoCL-IPHN`, ..."""
        return f"{self.base.title}-{self.variant.upper()}"

    def strength(self, progress: float) -> float:
        """Augmentation strength of the host."""
        return self.base.strength(progress)

    # ------------------------------------------------------------------ one step
    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return the terms of the host, on ACL with `inferior_positives` beside them; see `Objective.__call__`."""
        sigma = [self.sigma]

        def attack(loss_fn: LossFn, x: Tensor) -> Tensor:
            x_adv = context.attack(loss_fn, x)
            if self.sigma_warmup and self._inferior:
                images = len(batch[self.views[0]])  # the first ones: hosts attack more than one view at a time
                sigma[0] = self._adapted(model, context, x[:images], x_adv[:images])
            return x_adv

        observed = replace(context, attack=attack)
        if isinstance(self.base, RoCL):
            return self._on_rocl(self.base, model, batch, observed, sigma)
        if isinstance(self.base, AdvCL):
            return self._on_advcl(self.base, model, batch, observed, sigma)
        return self._on_acl(model, batch, observed, sigma)

    def _on_rocl(
        self, base: RoCL, model: nn.Module, batch: dict[str, Tensor], context: StepContext, sigma: list[float]
    ) -> dict[str, Tensor]:
        def contrast(views: Sequence[Tensor]) -> Tensor:
            rule = inferior_positives(3, (2,), sigma[0], self.pair_weight) if self._inferior else None
            return base.contrast(views, pairs=rule, hard_negatives=self._hard_negatives("released_rocl"))

        return base.terms(model, batch, context, contrast)

    def _on_advcl(
        self, base: AdvCL, model: nn.Module, batch: dict[str, Tensor], context: StepContext, sigma: list[float]
    ) -> dict[str, Tensor]:
        released = self.infonce_formulation == "released"
        symmetric = adversarial_anchors(4, (0,), self.pair_weight) if released else None

        def contrast(views: Sequence[Tensor]) -> Tensor:
            rule = inferior_positives(4, (0,), sigma[0], self.pair_weight) if self._inferior else symmetric
            return base.contrast(views, pairs=rule, hard_negatives=self._hard_negatives("released_advcl"))

        return base.terms(model, batch, context, contrast, partial(base.contrast, pairs=symmetric))

    def _on_acl(
        self, model: nn.Module, batch: dict[str, Tensor], context: StepContext, sigma: list[float]
    ) -> dict[str, Tensor]:
        base: Any = self.base
        x = torch.cat([batch["view_1"], batch["view_2"]])
        x_adv = context.attack(base.pair_loss(*base.attacked(model, context)), x)
        z_adv, z = base.passes(model, [("adv", x_adv), ("clean", x)], context)
        views = [gather(part) for part in (*z.chunk(2), *z_adv.chunk(2))]
        options: dict[str, Any] = {"temperature": base.temperature, "hard_negatives": self._hard_negatives("fixed")}
        weights = base.weights(context.progress)
        terms = {
            "clean": weights[0] * supcon(views[:2], **options),
            "adversarial": weights[1] * supcon(views[2:], **options),
        }
        if self._inferior:
            rule = inferior_positives(4, (2, 3), sigma[0], self.pair_weight)
            # Without the pairs within a stream. Of the 12 ordered pairs that supcon averages, 8 are left, with a
            # weight of 2 on each two of them: 3/2 makes it the mean over the four pairs of views.
            rule = PairRule(1.5 * rule.weights * rule.detached, rule.detached)
            terms["inferior_positives"] = supcon(views, pairs=rule, **options)
        return terms

    # ------------------------------------------------------------------ sigma
    @property
    def _inferior(self) -> bool:
        return self.variant != "hn"

    def _hard_negatives(self, released: Any) -> HardNegatives | None:
        if self.variant == "ip":
            return None
        return HardNegatives(self.beta, self.tau_plus, released if self.infonce_formulation == "released" else "fixed")

    def _adapted(self, model: nn.Module, context: StepContext, x: Tensor, x_adv: Tensor) -> float:
        """Sigma of this step; keeps the sum and the number of the distances in the memory while it warms up."""
        module: Any = unwrapped(model)
        with frozen(module), torch.no_grad():
            features, attacked = (module.features(images, self.clean_branch).float() for images in (x, x_adv))
            distances = gather(F.pairwise_distance(features, attacked)[:, None])
        if isinstance(distances, FakeTensor):  # memory is foreseen, nothing computed: there is no number to ask for
            return self.sigma
        distance, memory = float(distances.mean()), context.memory
        if context.progress < self.sigma_warmup:
            memory["distance_sum"] = memory.get("distance_sum", 0.0) + distance * len(distances)
            memory["distance_images"] = memory.get("distance_images", 0.0) + len(distances)
            return self.sigma
        seen = memory.get("distance_images", 0.0)
        return self.adapted_sigma(distance, memory["distance_sum"] / seen) if seen else self.sigma

    def adapted_sigma(self, distance: float, mean_distance: float) -> float:
        """Sigma after the warm-up, see the class.

        Args:
            distance (`float`): d of the present batch.
            mean_distance (`float`): D, its mean over the warm-up.

        Returns:
            `float`: between `sigma` and 1/2.
        """
        if distance > mean_distance:
            return self.sigma
        if distance < self.minimal_distance:
            return 0.5
        room = mean_distance - self.minimal_distance
        return self.sigma + (0.5 - self.sigma) * ((mean_distance - distance) / room if room else 0.0)
