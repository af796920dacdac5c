"""A network whose embeddings can be written down by hand, an attack with a known result, and the slow equations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

N, PIXELS, WIDTH = 5, 12, 4


class LinearModel(nn.Module):
    """Embedding = flattened pixels times one matrix per branch; remembers every pass and every embedding call."""

    def __init__(self, seed: int = 0, branches: tuple[str, ...] = ("clean", "adv")) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.ParameterDict(
            {branch: torch.randn(PIXELS, WIDTH, generator=generator) for branch in branches}
        )
        self.passes: list[tuple[str, Tensor]] = []
        self.embedded: list[tuple[str, int]] = []

    def embed(self, images: Tensor, branch: str) -> Tensor:
        self.embedded.append((branch, len(images)))
        return images.flatten(1) @ self.weight[branch]

    def forward(self, passes: list[tuple[str, Tensor]]) -> list[Tensor]:
        self.passes += passes
        return [self.embed(images, branch) for branch, images in passes]

    def numpy(self, images: Tensor, branch: str) -> np.ndarray:
        """The same embedding, outside torch."""
        return images.flatten(1).double().numpy() @ self.weight[branch].detach().double().numpy()


class Nudge:
    """Stands in for PGD: moves every pixel by a fixed pattern and keeps the loss it was asked to raise."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Tensor]] = []

    def __call__(self, loss_fn: Any, x: Tensor) -> Tensor:
        self.calls.append((loss_fn, x))
        return self.of(x)

    @staticmethod
    def of(x: Tensor) -> Tensor:
        pattern = torch.arange(x.numel()).view_as(x).float().mul(2.3).sin()
        return (x + 0.03 * pattern).clamp(0, 1)


def random_views(seed: int = 3) -> dict[str, Tensor]:
    """`view_1`, `view_2` and `original`, `(N, 3, 2, 2)` each."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(N, 3, 2, 2, generator=generator) for name in ("view_1", "view_2", "original")}


def labelled(name: str = "padded_crop", size: int = 2, seed: int = 3) -> dict[str, Tensor]:
    """One view `(N, 3, size, size)` and its labels, of three classes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(N, 3, size, size, generator=generator), "label": torch.tensor([2, 0, 1, 1, 0])}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of every row."""
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def slow_cross_entropy(logits: np.ndarray, labels: Tensor) -> list[float]:
    """Minus the logarithm of the probability of the label, per image."""
    return [float(np.log(np.exp(row).sum()) - row[y]) for row, y in zip(logits, labels.tolist(), strict=True)]


def slow_kl(logits_p: np.ndarray, logits_q: np.ndarray) -> float:
    """Mean over the images of sum p log(p / q)."""
    p, q = softmax(logits_p), softmax(logits_q)
    return sum(float(a * math.log(a / b)) for a, b in zip(p.ravel(), q.ravel(), strict=True)) / len(p)


def cosine(u: np.ndarray, v: np.ndarray) -> float:
    return float(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))


def slow_nt_xent(z_i: np.ndarray, z_j: np.ndarray, temperature: float = 0.5) -> float:
    """Mean over 2N anchors of -log(e^(c with the partner / t) / sum over all others of e^(c / t))."""
    return sum(slow_nt_xent_per_image(z_i, z_j, temperature)) / len(z_i)


def slow_nt_xent_per_image(z_i: np.ndarray, z_j: np.ndarray, temperature: float = 0.5) -> list[float]:
    """The same for every image: the mean over its two anchors."""
    z, n = np.concatenate([z_i, z_j]), len(z_i)
    anchors = []
    for row in range(2 * n):
        others = [math.exp(cosine(z[row], z[k]) / temperature) for k in range(2 * n) if k != row]
        partner = math.exp(cosine(z[row], z[(row + n) % (2 * n)]) / temperature)
        anchors.append(-math.log(partner / sum(others)))
    return [(first + second) / 2 for first, second in zip(anchors[:n], anchors[n:], strict=True)]
