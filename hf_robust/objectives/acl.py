"""ACL: adversarial contrastive learning, the base of DynACL and AIR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_robust.losses import gather, nt_xent
from hf_robust.objectives.base import Objective, StepContext, check_temperature

__all__ = ["ACL"]


@dataclass
class ACL(Objective):
    """NT-Xent on clean views and on adversarial views that were attacked to raise it.

    Modes: `"ds"` (dual stream, the published default) averages the clean loss through the clean branch and the
    adversarial loss through the adversarial branch; `"a2a"` keeps the adversarial stream only; `"a2s"` attacks view 1
    and contrasts it with the clean view 2 (described in the paper, in no released code: our reading).

    Reads with: `losses.nt_xent`, `attacks.PGD`. Better than SimCLR whenever the encoder will meet an adversary;
    DynACL and AIR build on it.

    Source: Jiang et al. 2020; released code `train_simCLR.py` (modes), `ACL_RCS.py`. Loss 1/2 (clean + adversarial);
        both views are attacked jointly, in evaluation mode, through the adversarial branch, on un-weighted NT-Xent;
        order of the train-mode passes: adversarial, then clean. Paper and code agree.
    """

    take_when: ClassVar[str] = "you want the plain robust baseline"
    citation: ClassVar[str] = """@inproceedings{jiang2020acl,
  title     = {Robust Pre-Training by Adversarial Contrastive Learning},
  author    = {Jiang, Ziyu and Chen, Tianlong and Chen, Ting and Wang, Zhangyang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}"""

    temperature: float = field(default=0.5, metadata={"help": "Temperature of the contrastive loss; published: 0.5."})
    mode: Literal["ds", "a2a", "a2s"] = field(
        default="ds", metadata={"help": "ds: clean and adversarial stream (published); a2a; a2s."}
    )

    def __post_init__(self) -> None:
        if self.mode not in ("ds", "a2a", "a2s"):
            raise ValueError(f"mode must be 'ds', 'a2a' or 'a2s', got {self.mode!r}: published runs use 'ds'")
        check_temperature(self.temperature)

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """`("adv",)` in mode a2a, where no clean image passes the network; both otherwise."""
        return ("adv",) if self.mode == "a2a" else ("clean", "adv")

    def weights(self, progress: float) -> tuple[float, float]:
        """Weights of the clean and the adversarial loss; they sum to 1.

        Args:
            progress (`float`): training progress in [0, 1].

        Returns:
            `tuple[float, float]`: clean weight, adversarial weight.
        """
        return (0.5, 0.5)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return the terms `clean` and `adversarial` (mode ds), or `adversarial`; see `Objective.__call__`."""
        if self.mode == "a2s":
            return self._adversarial_to_standard(model, batch, context)
        x = torch.cat([batch["view_1"], batch["view_2"]])
        embed, partner_embed = self.attacked(model, context)
        x_adv = context.attack(self.pair_loss(embed, partner_embed), x)
        if self.mode == "a2a":
            (z_adv,) = model([("adv", x_adv)])
            return {"adversarial": self.contrast(z_adv)}
        z_adv, z = self.passes(model, [("adv", x_adv), ("clean", x)], context)
        clean_weight, adversarial_weight = self.weights(context.progress)
        return {"clean": clean_weight * self.contrast(z), "adversarial": adversarial_weight * self.contrast(z_adv)}

    def contrast(self, z: Tensor) -> Tensor:
        """NT-Xent of `(2N, D)` embeddings, first views on top of second views, over all processes."""
        z_i, z_j = z.chunk(2)
        return nt_xent(gather(z_i), gather(z_j), self.temperature)

    def attacked(self, model: nn.Module, context: StepContext) -> tuple[Callable[[Tensor], Tensor], ...]:
        """Embedding functions that the attack looks through, for the first and for the second views."""
        seen = context.seen(model)

        def embed(images: Tensor) -> Tensor:
            return seen.embed(images, "adv")

        return embed, embed

    def pair_loss(
        self, embed: Callable[[Tensor], Tensor], partner_embed: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """The attacked loss: NT-Xent of `(2N, 3, H, W)` images, first views on top of second views."""

        def loss(images: Tensor) -> Tensor:
            if embed is partner_embed:
                return self.contrast(embed(images))
            first, second = images.chunk(2)
            return self.contrast(torch.cat([embed(first), partner_embed(second)]))

        return loss

    def passes(self, model: nn.Module, passes: list[tuple[str, Tensor]], context: StepContext) -> list[Tensor]:
        """Train-mode embeddings of each `(branch, images)`; one call of the wrapped model."""
        return model(passes)

    def candidate_passes(
        self, model: nn.Module, batch: dict[str, Tensor], context: StepContext
    ) -> list[tuple[str, Tensor]]:
        """Mode ds: `adv` and `clean`, both views stacked; the other modes pass what they train on; see `Objective`.

        The candidate is attacked through the trained network alone, also where a momentum encoder exists (released
        `RCS.py`). Inside `losses.ungathered` the attack, too, sees the images of this process only.
        """
        if self.mode == "a2s":
            return [("adv", self._attack_first_views(model, batch, context)), ("clean", batch["view_2"])]
        x = torch.cat([batch["view_1"], batch["view_2"]])
        x_adv = context.attack(self.pair_loss(*self.attacked(model, replace(context, teacher=None))), x)
        return [("adv", x_adv)] if self.mode == "a2a" else [("adv", x_adv), ("clean", x)]

    def candidate_losses(self, outputs: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """NT-Xent of every image; the two streams of mode ds count 1/2 each at any progress; see `Objective`."""
        pairs = [outputs] if self.mode == "a2s" else [z.chunk(2) for z in outputs]
        losses = [nt_xent(z_i, z_j, self.temperature, reduction="none") for z_i, z_j in pairs]
        return torch.stack(losses).mean(0)

    def _adversarial_to_standard(
        self, model: nn.Module, batch: dict[str, Tensor], context: StepContext
    ) -> dict[str, Tensor]:
        view_adv = self._attack_first_views(model, batch, context)
        z_adv, z = model([("adv", view_adv), ("clean", batch["view_2"])])
        return {"adversarial": nt_xent(gather(z_adv), gather(z), self.temperature)}

    def _attack_first_views(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> Tensor:
        """Mode a2s: first views, attacked to raise their contrast with the clean second views."""
        seen = context.seen(model)
        targets: list[Tensor] = []

        def loss(images: Tensor) -> Tensor:
            if not targets:  # encoded once, inside the attack, where the network is in evaluation mode
                with torch.no_grad():
                    targets.append(seen.embed(batch["view_2"], "clean"))
            return nt_xent(gather(seen.embed(images, "adv")), gather(targets[0]), self.temperature)

        return context.attack(loss, batch["view_1"])
