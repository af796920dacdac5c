"""RoCL: robust contrastive learning, the adversarial image as a third view of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_robust.attacks import PGD
from hf_robust.losses import gather
from hf_robust.multiview_losses import supcon
from hf_robust.objectives.base import Objective, StepContext, check_temperature

__all__ = ["RoCL"]


@dataclass
class RoCL(Objective):
    """NT-Xent of two clean views and an adversarial one, all through one norm branch.

    View 1 is attacked to raise NT-Xent(view 1, view 2), then

        L = NTX(view 1, view 2, adversarial) + regularizer_weight * NTX(adversarial, view 2),

    where NTX of V views of N images is 1/(V N) times the sum of -log softmax over all V N anchors and the V - 1
    positives of each, at cosines over the temperature, with gradient to the anchors only.

    Reads with: `multiview_losses.supcon`. The oldest of the family and the only one with a single norm branch, which
    sees clean and adversarial images mixed: take it where an encoder must not have branches; ACL and its successors
    are more robust. A step costs about 7 attack steps of N images (ACL: 5 of 2N).

    Source: Kim et al. 2020; RoCL@b6d5185, `src/rocl_train.py`, `src/attack_lib.py` (`RepresentationAdv`, attack to and
        regularisation by the other view), `src/loss.py`. The paper adds the positives inside the logarithm; we follow
        the code, which adds logarithms. Passes as released: first the pair of the regulariser, then all three views.
        The release attacks and regularises against the negatives of one GPU; here they are gathered, so that
        processes add up to one. View 2 is embedded once per attack, not once per step: it is a constant there.
    """

    take_when: ClassVar[str] = "the encoder must have a single set of norm statistics while it trains"
    citation: ClassVar[str] = """@inproceedings{kim2020rocl,
  title     = {Adversarial Self-Supervised Contrastive Learning},
  author    = {Kim, Minseon and Tack, Jihoon and Hwang, Sung Ju},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}"""
    clean_branch: ClassVar[str] = "adv"
    training_attack: ClassVar[PGD] = PGD(eps=0.0314, step_size=0.007, steps=7, clip_start=True)
    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"learning_rate": 1.5, "min_learning_rate": 0.0, "lr_granularity": "epoch"}  # the rest are the defaults
    )

    temperature: float = field(default=0.5, metadata={"help": "Temperature of the contrastive loss; published: 0.5."})
    regularizer_weight: float = field(
        default=1 / 256, metadata={"help": "Weight of NT-Xent(adversarial, view 2); published: 1/256."}
    )

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if not 0 <= self.regularizer_weight < float("inf"):
            raise ValueError(
                f"regularizer_weight must be 0 or more, got {self.regularizer_weight}: published is 1/256, written "
                "0.00390625"
            )

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """One branch, the one the encoder is used through downstream."""
        return ("adv",)

    @property
    def network(self) -> Mapping[str, Any]:
        """Two linear layers without norm as projector, and pixels as they are."""
        return {
            "projector_layers": 2,
            "projector_hidden_dim": 2048,
            "projector_dim": 128,
            "projector_norms": "none",
            "mean": None,
            "std": None,
        }

    @property
    def view_options(self) -> Mapping[str, Any]:
        """Crops of 8 % of the area or more, of images whose colours have been changed."""
        return {"minimal_area": 0.08, "colors_first": True}

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return the terms `contrastive` and `regularizer`; see `Objective.__call__`."""
        return self.terms(model, batch, context, self.contrast)

    def terms(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        context: StepContext,
        contrast: Callable[[Sequence[Tensor]], Tensor],
    ) -> dict[str, Tensor]:
        """The loss terms with another loss of the three views, for methods that stand on this one.

        Args:
            model, batch, context: as in `Objective.__call__`.
            contrast (`Callable[[Sequence[Tensor]], Tensor]`): scalar of the embeddings `(N, P)` of view 1, view 2 and
                the adversarial view, not gathered.

        Returns:
            `dict[str, torch.Tensor]`: `contrastive` and `regularizer`.
        """
        first, second = batch["view_1"], batch["view_2"]
        adversarial = self._attack_first_views(model, batch, context)
        z_pair, z = model(
            [("adv", torch.cat([adversarial, second])), ("adv", torch.cat([first, second, adversarial]))]
        )
        return {
            "contrastive": contrast(z.chunk(3)),
            "regularizer": self.regularizer_weight * self.contrast(z_pair.chunk(2)),
        }

    def contrast(self, views: Sequence[Tensor], **options: Any) -> Tensor:
        """NTX of embeddings `(N, P)` per view, over all processes; see the class.

        Args:
            views (`Sequence[torch.Tensor]`): two or more embeddings `(N, P)`, not gathered.
            options: `pairs` and `hard_negatives` of `multiview_losses.supcon`.

        Returns:
            `torch.Tensor` of shape `()`.
        """
        gathered = [gather(z) for z in views]
        return supcon(gathered, temperature=self.temperature, positives="sum", detach_keys=True, **options)

    def _attack_first_views(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> Tensor:
        seen = context.seen(model)
        targets: list[Tensor] = []

        def loss(images: Tensor) -> Tensor:
            if not targets:  # encoded once, inside the attack, where the network is in evaluation mode
                with torch.no_grad():
                    targets.append(seen.embed(batch["view_2"], "adv"))
            return self.contrast([seen.embed(images, "adv"), targets[0]])

        return context.attack(loss, batch["view_1"])
