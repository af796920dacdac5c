"""The published selection of RCS, plain and eager; see `benchmarks.reference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reference import EPS, nt_xent, pgd, uniform_noise

__all__ = ["select"]

HEAD_STEP, VALIDATION_STEPS = 0.01, 3
Noise = Callable[[str, Tensor], Tensor]


def min_max_distance(z: Tensor, z_adv: Tensor) -> Tensor:
    """Mean of q log(q / p) for rows stretched to [0, 1], q the adversarial ones, over all elements."""
    p, q = ((v - v.amin(1, keepdim=True)) / (v.amax(1, keepdim=True) - v.amin(1, keepdim=True)) for v in (z, z_adv))
    p, q = p + 1e-8, q + 1e-8
    return (q * (q.log() - p.log())).mean()


def select(
    model: Any,
    minibatches: Sequence[Tensor],
    validation: Sequence[Tensor],
    picks: int,
    noise: Noise = lambda name, x: uniform_noise(x),
) -> tuple[list[int], list[float]]:
    """Numbers of the minibatches chosen, in order, and their gains; the model comes back as it was.

    Every candidate is attacked in five steps, its features go through the head with gradient, and a backward pass per
    candidate gives the gradient of the linear layers, kept whole and averaged over the outputs of each layer. For
    every pick the validation images are attacked anew in three steps. 12 F per view of a candidate, 9 F per pick and
    validation image.

    Args:
        model ([`RobustModelForPreTraining`]): with the branches `clean` and `adv`.
        minibatches (`Sequence[torch.Tensor]`): interleaved views `(2N, 3, H, W)` in [0, 1] each.
        validation (`Sequence[torch.Tensor]`): batches of un-augmented images in [0, 1].
        picks (`int`): minibatches to choose.
        noise (`Callable`): name of the attack (`"candidate 0"`, `"validation"`) and images to its start.

    Source: RCS (Xu et al. 2023), released version with its distance on CIFAR-10: signatures averaged over the outputs,
        the step on the head taken twice. Every validation image counts once, where that code takes half of them twice.
    """
    wanted = [p for p in model.backbone.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    layers = [layer for layer in model.projector.modules() if isinstance(layer, nn.Linear)]
    weights: list[Tensor] = [p for layer in layers for p in layer.parameters()]
    before = [p.detach().clone() for p in weights]
    try:
        gradients = [
            _candidate_gradient(model, weights, x, noise(f"candidate {number}", x))
            for number, x in enumerate(minibatches)
        ]
        return _greedy(model, weights, gradients, validation, picks, noise)
    finally:
        with torch.no_grad():
            for p, value in zip(weights, before, strict=True):
                p.copy_(value)
        for p in wanted:
            p.requires_grad_(True)
        model.zero_grad()


def _candidate_gradient(model: Any, weights: list[Tensor], x: Tensor, noise: Tensor) -> list[Tensor]:
    adversarial = pgd(model, x, lambda images: nt_xent(model.embed(images, "adv")), noise)
    with torch.no_grad():
        features_adv, features = model.features(adversarial, "adv"), model.features(x, "clean")
    model.zero_grad()
    loss = (nt_xent(model.head(features, "clean")) + nt_xent(model.head(features_adv, "adv"))) / 2
    loss.backward()
    return _taken(weights)


def _greedy(
    model: Any,
    weights: list[Tensor],
    gradients: list[list[Tensor]],
    validation: Sequence[Tensor],
    picks: int,
    noise: Noise,
) -> tuple[list[int], list[float]]:
    signatures = torch.stack([_signature(gradient) for gradient in gradients])
    left = set(range(len(gradients)))
    chosen: list[int] = []
    gains: list[float] = []
    while len(chosen) < picks:
        present = signatures @ _signature(_validation_gradient(model, weights, validation, noise))
        best = max(left, key=lambda number: (float(present[number]), -number))
        left.remove(best)
        chosen.append(best)
        gains.append(float(present[best]))
        with torch.no_grad():
            for _ in range(2):  # the released update runs through two names of one module
                for p, gradient in zip(weights, gradients[best], strict=True):
                    p -= HEAD_STEP * gradient
    return chosen, gains


def _validation_gradient(
    model: Any, weights: list[Tensor], validation: Sequence[Tensor], noise: Noise
) -> list[Tensor]:
    features, features_adv = [], []
    for x in validation:
        with torch.no_grad():
            clean = model.embed(x, "clean")
        adversarial = pgd(
            *(model, x, lambda images, z=clean: min_max_distance(z, model.embed(images, "adv"))),
            noise("validation", x),
            step_size=1.25 * EPS / VALIDATION_STEPS,
            steps=VALIDATION_STEPS,
        )
        with torch.no_grad():
            features.append(model.features(x, "clean"))
            features_adv.append(model.features(adversarial, "adv"))
    model.zero_grad()
    z, z_adv = model.head(torch.cat(features), "clean"), model.head(torch.cat(features_adv), "adv")
    min_max_distance(z, z_adv).backward()
    return _taken(weights)


def _taken(weights: list[Tensor]) -> list[Tensor]:
    return [p.grad.detach().clone() if p.grad is not None else torch.zeros_like(p) for p in weights]


def _signature(gradient: list[Tensor]) -> Tensor:
    return torch.cat([g.mean(0) if g.dim() == 2 else g.mean().view(1) for g in gradient])
