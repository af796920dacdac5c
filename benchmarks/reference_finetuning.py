"""The published fine-tuning steps and PGD-20, plain and eager; see `benchmarks.reference`.

These attacks differentiate the images only, as released. TRADES computes the clean prediction, a constant, again in
each of its steps. AutoLoRa adds the low-rank product to the weight of every adapted convolution, in each pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.reference import pgd, uniform_noise

__all__ = ["AFFStep", "ALFStep", "AutoLoRaStep", "SLFStep", "right_answers"]

STEPS, START_STD = 10, 0.001
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 2e-4


def divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q), mean over the images."""
    return F.kl_div(F.log_softmax(logits_q, dim=1), F.softmax(logits_p, dim=1), reduction="sum") / len(logits_p)


class SLFStep:
    """Cross-entropy of clean images; the whole network in evaluation mode, the head alone trains. 1 F per image.

    Args:
        model ([`RobustModelForPreTraining`]): with a classifier.
        lr (`float`): of SGD.
    """

    def __init__(self, model: Any, lr: float = LR) -> None:
        self.model = model
        model.backbone.requires_grad_(False)
        self.optimizer = torch.optim.SGD(model.classifier.parameters(), lr, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def __call__(self, x: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Train one step on images in [0, 1]; the loss before it."""
        self.model.eval()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model.embed(x, "adv"), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class ALFStep(SLFStep):
    """The same on images attacked in ten steps from a uniform start. 21 F per image."""

    def __call__(self, x: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Train one step on images in [0, 1]; the loss before it."""
        noise = uniform_noise(x) if noise is None else noise
        x = pgd(
            *(self.model, x, lambda images: F.cross_entropy(self.model.embed(images, "adv"), labels), noise),
            steps=STEPS,
            by_backward=False,
        )
        return super().__call__(x, labels)


class AFFStep:
    """TRADES with beta 6 and two norm branches. 36 F per image: clean pass, adversarial pass and back, ten times.

    Args:
        model ([`RobustModelForPreTraining`]): with a classifier and the branches `clean` and `adv`.
        lr (`float`): of SGD.
    """

    def __init__(self, model: Any, lr: float = LR) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def __call__(self, x: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Train one step on images in [0, 1]; the loss before it."""
        model = self.model
        noise = START_STD * torch.randn_like(x) if noise is None else noise

        def distance(images: Tensor) -> Tensor:
            return divergence(model.embed(x, "clean"), model.embed(images, "adv"))

        adversarial = pgd(model, x, distance, noise, steps=STEPS, by_backward=False)
        model.train()
        self.optimizer.zero_grad()
        logits, logits_adv = model.embed(x, "clean"), model.embed(adversarial, "adv")
        loss = F.cross_entropy(logits, labels) + 6 * divergence(logits, logits_adv)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class AutoLoRaStep:
    """One step of AutoLoRa at a given standard accuracy. 26 F per image.

    Args:
        model ([`RobustModelForPreTraining`]): plain, with a classifier and the branch `adv`.
        factors (`dict`): name of a convolution in the backbone to its factors A `(r, C_in k k)` and B `(C_out, r)`
            and the scale of their product; both become parameters here.
        lr (`float`): of SGD.
    """

    def __init__(self, model: Any, factors: dict[str, tuple[Tensor, Tensor, float]], lr: float = LR) -> None:
        self.model = model
        self.factors = {
            name: (nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone()), scale)
            for name, (a, b, scale) in factors.items()
        }
        low_rank: Iterable[Tensor] = [factor for a, b, _ in self.factors.values() for factor in (a, b)]
        self.optimizer = torch.optim.SGD([*model.parameters(), *low_rank], lr, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def natural(self, x: Tensor) -> Tensor:
        """Logits of clean images: adapted weights, the network's own ones without gradient."""
        backbone = self.model.backbone
        wanted = [p for p in backbone.parameters() if p.requires_grad]
        for p in wanted:
            p.requires_grad_(False)
        weights = {
            f"{name}.weight": (w := backbone.get_submodule(name).weight) + scale * (b @ a).view_as(w)
            for name, (a, b, scale) in self.factors.items()
        }
        logits = self.model.classifier(functional_call(backbone, weights, (self.model.normalize(x),)))
        for p in wanted:
            p.requires_grad_(True)
        return logits

    def __call__(
        self, x: Tensor, labels: Tensor, standard_accuracy: float = 0.5, noise: Tensor | None = None
    ) -> Tensor:
        """Train one step on images in [0, 1]; the loss before it."""
        model = self.model
        noise = START_STD * torch.randn_like(x) if noise is None else noise
        adversarial = pgd(
            *(model, x, lambda images: F.cross_entropy(model.embed(images, "adv"), labels), noise),
            steps=STEPS,
            by_backward=False,
        )
        model.train()
        self.optimizer.zero_grad()
        logits, logits_adv = self.natural(x), model.embed(adversarial, "adv")
        loss = (1 - standard_accuracy) * F.cross_entropy(logits, labels)
        loss = loss + standard_accuracy * F.cross_entropy(logits_adv, labels)
        loss = loss + 6 * standard_accuracy * divergence(logits, logits_adv)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def right_answers(model: Any, x: Tensor, labels: Tensor, noise: Tensor | None = None) -> tuple[int, int]:
    """Right answers on clean and on PGD-20 images, through the branch `adv`. 42 F per image.

    Args:
        model ([`RobustModelForPreTraining`]): with a classifier; left in evaluation mode.
        x (`torch.Tensor` of shape `(N, 3, H, W)`): images in [0, 1].
        labels (`torch.Tensor` of shape `(N,)`): int64.
        noise (`torch.Tensor`, *optional*): start of the attack; default: uniform.
    """
    model.eval()
    noise = uniform_noise(x) if noise is None else noise
    adversarial = pgd(
        *(model, x, lambda images: F.cross_entropy(model.embed(images, "adv"), labels), noise),
        steps=20,
        by_backward=False,
    )
    with torch.no_grad():
        clean, attacked = (int((model.embed(images, "adv").argmax(1) == labels).sum()) for images in (x, adversarial))
    return clean, attacked
