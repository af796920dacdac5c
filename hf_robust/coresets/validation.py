"""The other side of the comparison: how the representation of held-out images moves under attack."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_robust.attacks import PGD
from hf_robust.data import collate_images
from hf_robust.losses import representational_distance

from .base import SelectionTask
from .head import Head, Outputs, Weights, process_count, process_number, summed, wide

__all__ = ["ATTACK_SCALE", "ValidationDistance"]

# The gradient of a mean over many images underflows in half precision, and an attack ignores the scale of its loss. A
# power of two changes no bit in the other precisions.
ATTACK_SCALE = 1024.0
OT_BLOCK = 256  # images whose transport is solved together, as released


class ValidationDistance:
    """Representational distance between the validation images and their attacked versions, with its gradient.

    Clean features are computed once: the backbone does not change during a selection. The attack maximises the same
    distance, through the head as it stands after the picks so far. Several processes attack different images and
    exchange the features, so that all of them hold the same gradient.

    Args:
        task ([`SelectionTask`]): model and validation images.
        head ([`Head`]): the head of the model.
        kind (`str`): of `losses.representational_distance`.
        steps (`int`): attack steps. All steps together reach 1.25 eps, as released (10/255 at eps = 8/255); a single
            step crosses the ball to x + eps sign(gradient), which is where the released single steps end.
        reattack (`bool`): attack anew after every pick (exact), or keep the first adversarial features and re-evaluate
            the head alone.

    Source: Xu et al. 2023 (RCS), L_RD; released code `RCS.py`: uniform start, 3 steps of 10/255/3, un-augmented
        validation images, evaluation mode, adversarial images through the adversarial branch. The released code uses
        the first half of the validation images, twice; here each is used once.
    """

    def __init__(self, task: SelectionTask, head: Head, kind: str, steps: int, reattack: bool) -> None:
        self._task, self._head, self._kind, self._reattack = task, head, kind, reattack
        branches = task.model.switch.branches
        self._clean = "clean" if "clean" in branches else branches[0]
        self._attacked = "adv" if "adv" in branches else branches[0]
        eps, norm = task.attack.eps, task.attack.norm
        step_size = (2.5 if steps == 1 else 1.25) * eps / max(1, steps)
        self._attack = PGD(eps, min(1.0, step_size) if norm == "linf" else step_size, steps, norm)
        self._generator = task.generator("validation attack")
        # as many at a time as one process trains on; optimal transport compares an image with all of its block
        size = min(OT_BLOCK, task.batch_size) if kind == "ot" else -(-task.batch_size // process_count())
        blocks = task.validation.split(size)
        self._sizes = [len(rows) for rows in blocks]
        self._images = {  # uint8: a quarter of the memory of the pixels that are attacked
            k: collate_images([task.dataset[int(i)] for i in blocks[k]])["image"].to(task.device)
            for k in range(process_number(), len(blocks), process_count())
        }
        self._pixel = task.originals(task.dataset[int(blocks[0][0])]["image"][None].to(task.device))
        clean = {k: self._encode(task.originals(x), self._clean) for k, x in self._images.items()}
        self._features = self._exchanged(clean)
        self._adversarial: list[Tensor] = []

    def gradient(self, weights: Weights) -> Tensor:
        """Gradient of the distance with respect to the head, both arguments moving.

        Args:
            weights (`dict[str, torch.Tensor]`): of the head.

        Returns:
            `torch.Tensor` of shape `(length of a head gradient,)`.
        """
        if self._reattack or not self._adversarial:
            outputs = self._head.outputs(weights)
            self._adversarial = self._exchanged(
                {
                    k: self._encode(
                        self._attack_batch(self._images[k], self._features[k], outputs, start), self._attacked
                    )
                    for k, start in self._starts()
                }
            )
        blocks = list(zip(self._features, self._adversarial, strict=True))
        if self._kind != "ot":  # means over rows: one block is the same and faster
            blocks = [(torch.cat(self._features), torch.cat(self._adversarial))]
        images = sum(len(clean) for clean, _ in blocks)

        def distance(outputs: Outputs) -> Tensor:
            distances = [
                representational_distance(outputs(self._clean, c), outputs(self._attacked, a), self._kind) * len(c)
                for c, a in blocks
            ]
            return torch.stack(distances).sum() / images

        return self._head.gradient(distance, weights)

    def _starts(self) -> Iterator[tuple[int, Tensor]]:
        """First perturbations of this process's blocks; drawn for all, so that they do not depend on its number."""
        for k, size in enumerate(self._sizes):
            drawn = self._attack.first(self._pixel.expand(size, *self._pixel.shape[1:]), self._generator)
            if k in self._images:
                yield k, drawn

    def _exchanged(self, found: dict[int, Tensor]) -> list[Tensor]:
        """Features of all blocks, from those of the blocks of this process."""
        if process_count() == 1:
            return [found[k] for k in range(len(self._sizes))]
        width = self._encode(self._pixel, self._clean).shape[1]
        every = torch.zeros(sum(self._sizes), width, **self._head.like)
        parts = list(every.split(self._sizes))
        for k, features in found.items():
            parts[k].copy_(features)
        return list(summed(every).split(self._sizes))

    def _attack_batch(self, images: Tensor, features: Tensor, outputs: Outputs, start: Tensor) -> Tensor:
        with torch.no_grad():
            clean = outputs(self._clean, features)

        def distance(images: Tensor) -> Tensor:
            with self._task.autocast():
                found = self._task.seen().features(images, self._attacked)
            return representational_distance(clean, outputs(self._attacked, found), self._kind) * ATTACK_SCALE

        return self._attack(distance, self._task.originals(images), start)

    @torch.no_grad()
    def _encode(self, images: Tensor, branch: str) -> Tensor:
        return wide(self._task.model.features(images, branch))
