"""Classifiers whose robust accuracy is known without an attack, for the tests of AutoAttack."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GAP = 40.0  # grey levels between neighbouring classes


class Ladder(nn.Module):
    """Classes are rungs of brightness: class k is brightest at level 40 k + 20, and ends 20 levels from it.

    The logits are linear in the pixels, so an attack within eps levels breaks exactly the images nearer than that to
    an end. `scale` makes them steeper without changing a decision.
    """

    def __init__(self, classes: int = 4, scale: float = 1.0) -> None:
        super().__init__()
        centres = torch.arange(classes) * GAP + GAP / 2
        self.weight = nn.Parameter(centres * scale / 400)
        self.bias = nn.Parameter(-centres.square() / 2 * scale / 400)

    def forward(self, images: Tensor) -> Tensor:
        level = images.mean((1, 2, 3)) * 255
        return level[:, None] * self.weight + self.bias


def ladder_images(levels: list[float], channels: int = 3, size: int = 6) -> tuple[Tensor, Tensor]:
    """One image of one grey level each, and the right label."""
    level = torch.tensor(levels, dtype=torch.float32)
    images = (level / 255).view(-1, 1, 1, 1).expand(-1, channels, size, size).contiguous()
    return images, (level / GAP).long()


# Two levels from an end: 42, 78 and 118; the others have 10 levels or more to go.
LEVELS = [20.0, 42.0, 60.0, 78.0, 90.0, 118.0, 130.0, 145.0, 50.0, 55.0]
STAYS = [True, False, True, False, True, False, True, True, True, True]
