"""The network, images and flags that the authors' own AutoAttack code was run on.

`tests/data/autoattack/tiny_cnn.safetensors` holds a small CNN, adversarially trained on CIFAR-10; `golden.npz` holds
images of the CIFAR-10 test set with the flags that fra31/auto-attack@a392200 (version "standard", L-inf, eps 8/255,
seed 0) left on three classifiers made from it: `plain`; `masked`, its logits times 1000; `quantised`, its input
rounded to 17 levels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "data" / "autoattack"
GOLDEN = np.load(FOLDER / "golden.npz")


class TinyCNN(nn.Module):
    """Four convolutions with batch norm on 32 x 32 pixels; the normalisation is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.ones(1, 3, 1, 1))
        for number, (inside, outside, stride) in enumerate([(3, 16, 2), (16, 32, 1), (32, 64, 2), (64, 64, 2)], 1):
            setattr(self, f"conv{number}", nn.Conv2d(inside, outside, 3, stride, 1, bias=False))
            setattr(self, f"bn{number}", nn.BatchNorm2d(outside))
        self.fc = nn.Linear(64 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        for number in range(1, 5):
            x = torch.relu(getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x)))
        return self.fc(x.flatten(1))


class Variant(nn.Module):
    """`plain`, `masked` or `quantised`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.network = name, TinyCNN()
        self.network.load_state_dict(load_file(FOLDER / "tiny_cnn.safetensors"))

    def forward(self, images: Tensor) -> Tensor:
        if self.name == "quantised":
            images = (images * 16).round() / 16
        return self.network(images) * (1000 if self.name == "masked" else 1)


def images_at(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Stored images, `(N, 3, 32, 32)` in [0, 1], and their labels; `rows` counts in the set of 200."""
    places = np.searchsorted(GOLDEN["rows"], rows)
    images = torch.from_numpy(GOLDEN["images"][places]).permute(0, 3, 1, 2).float() / 255
    return images.contiguous(), torch.from_numpy(GOLDEN["labels"][places])
