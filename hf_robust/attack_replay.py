"""What every training image's last attack ended at, so that its next one can start there."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_robust.attacks import PGD

__all__ = ["PerturbationMemory"]

_FILE = "perturbations.safetensors"
_LEVELS = 127


class PerturbationMemory:
    """Perturbations of all images of a data set, for an attack with `replay`.

    An image that a step shows in several views (ACL: two, stacked) has one perturbation for each. Views are drawn anew
    in every step, so a perturbation comes back to another crop of the same image. L-inf: int8, in 127ths of `eps`;
    L2: float16. They stay on the device of the attack: `views * C * H * W` bytes per image (CIFAR-10 and ACL: 307 MB),
    in L2 twice that; nothing is read back to the host.

    Args:
        attack ([`PGD`]): gives budget, norm and the start of images that were not attacked before.
        images (`int`): size of the data set.

    Source: ours. Replay *within* a minibatch, of the same views, is another method (Shafahi et al. 2019).
    """

    def __init__(self, attack: PGD, images: int) -> None:
        self._attack, self._images = attack, images
        self._stored: Tensor | None = None
        self._seen: Tensor | None = None

    def start(self, x: Tensor, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Perturbations to start an attack from: the last ones, and the attack's own for images without.

        Args:
            x (`torch.Tensor` of shape `(V N, C, H, W)`): V views of N images, one view of all images after the other.
            index (`torch.Tensor` of shape `(N,)`): int64, positions of the images in the data set.
            generator (`torch.Generator`, *optional*): source of the attack's own starts.

        Returns:
            `torch.Tensor` of shape `(V N, C, H, W)`.

        Raises:
            ValueError: if `x` does not hold equally many views of every image, or others than before.
        """
        views = self._views(x, index)
        fresh = self._attack.first(x, generator)
        if self._stored is None or self._seen is None:
            return fresh
        kept = self._decoded(self._stored[index].to(x.device)).to(x.dtype).transpose(0, 1).reshape(x.shape)
        known = self._seen[index].to(x.device).repeat(views).view(-1, *[1] * (x.dim() - 1))
        return torch.where(known, kept, fresh)

    def keep(self, delta: Tensor, index: Tensor) -> None:
        """Remember where an attack ended.

        Args:
            delta (`torch.Tensor` of shape `(V N, C, H, W)`): perturbations inside the ball.
            index (`torch.Tensor` of shape `(N,)`): as in `start`.
        """
        views = self._views(delta, index)
        rows = self._encoded(delta).reshape(views, len(index), *delta.shape[1:]).transpose(0, 1)
        if self._stored is None or self._seen is None:
            self._stored = rows.new_zeros(self._images, *rows.shape[1:])
            self._seen = torch.zeros(self._images, dtype=torch.bool, device=delta.device)
        self._stored[index] = rows
        self._seen[index] = True

    def save(self, folder: Path) -> None:
        """Write what is remembered into a checkpoint, exactly.

        Args:
            folder (`Path`): of the checkpoint.
        """
        if self._stored is not None and self._seen is not None:
            save_file({"stored": self._stored, "seen": self._seen}, str(folder / _FILE))

    def load(self, folder: Path, device: torch.device) -> None:
        """Remember what a checkpoint holds; nothing where it holds nothing.

        Args:
            folder (`Path`): of the checkpoint.
            device (`torch.device`): of the attack.

        Raises:
            ValueError: if it was written for another number of images.
        """
        self._stored = self._seen = None
        if not (folder / _FILE).is_file():
            return
        found = load_file(str(folder / _FILE), device=str(device))
        if len(found["seen"]) != self._images:
            raise ValueError(
                f"{str(folder / _FILE)!r} remembers perturbations of {len(found['seen'])} images, the training set "
                f"has {self._images}: resume on the same images, or start anew in another --output_dir"
            )
        self._stored, self._seen = found["stored"], found["seen"]

    def _views(self, x: Tensor, index: Tensor) -> int:
        views, rest = divmod(len(x), max(1, len(index)))
        if rest or not views:
            raise ValueError(
                f"an attack on {len(x)} images in a batch of {len(index)} cannot be replayed: it must see equally "
                "many views of every image; leave --attack_replay out"
            )
        shape = (views, *x.shape[1:])
        if self._stored is not None and self._stored.shape[1:] != shape:
            raise ValueError(
                f"remembered perturbations have the shape {tuple(self._stored.shape[1:])}, this attack's {shape}: "
                "perturbations can be replayed by one method at one image size only"
            )
        return views

    def _encoded(self, delta: Tensor) -> Tensor:
        if self._attack.norm == "l2":  # single pixels are far smaller than the ball
            return delta.half()
        return (delta / self._attack.eps * _LEVELS).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)

    def _decoded(self, stored: Tensor) -> Tensor:
        return stored.float() if self._attack.norm == "l2" else stored.float() * (self._attack.eps / _LEVELS)
