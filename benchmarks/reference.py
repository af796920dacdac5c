"""The published pre-training steps, plain and eager: what benchmarks compare with, and tests of equality.

Written from the published algorithms: rows of the two views interleaved (2m and 2m + 1 show image m), an attack that
calls `loss.backward()` through parameters nobody has frozen, whole N x N matrices of which a diagonal is kept, lists
of indices on the host, one optimiser update per tensor, one pass of the network per kind of image. The network is the
library's module, called as it stands: no fold, no other memory order, no lower precision, no compilation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ContrastiveStep", "PerTensorLARS", "interleave", "invariance", "nt_xent", "nt_xent_by_classes", "pgd"]

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 5


def interleave(view_1: Tensor, view_2: Tensor) -> Tensor:
    """Rows of two batches `(N, ...)` in turn, `(2N, ...)`."""
    return torch.stack([view_1, view_2], dim=1).flatten(0, 1)


def nt_xent(z: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent of interleaved views `(2N, D)`: the constant exp(1/t) is taken out of every denominator.

    Source: ACL; DynACL and RCS compute it the same way.
    """
    z = z / z.norm(dim=1, keepdim=True).clamp_min(1e-8)
    similarities = torch.exp(z @ z.t() / temperature)
    rows = list(range(len(z)))
    positive = similarities[rows, [row ^ 1 for row in rows]]
    return -torch.log(positive / (similarities.sum(1) - math.exp(1 / temperature))).mean()


def nt_xent_by_classes(z: Tensor, temperature: float = 0.5) -> Tensor:
    """The same number as a classification with 2N - 1 classes, cut out of the matrix by boolean masks.

    Source: AIR.
    """
    z = F.normalize(z[[*range(0, len(z), 2), *range(1, len(z), 2)]], dim=1)
    images = torch.cat([torch.arange(len(z) // 2)] * 2)
    same = (images[:, None] == images[None]).to(z.device)
    itself = torch.eye(len(z), dtype=torch.bool).to(z.device)
    same = same[~itself].view(len(z), -1)
    similarities = (z @ z.t())[~itself].view(len(z), -1)
    logits = torch.cat([similarities[same].view(len(z), 1), similarities[~same].view(len(z), -1)], dim=1)
    return F.cross_entropy(logits / temperature, torch.zeros(len(z), dtype=torch.long).to(z.device))


def invariance(z: Tensor, z_adv: Tensor, z_original: Tensor, temperature: float = 0.5) -> tuple[Tensor, Tensor]:
    """Standard and robust term of AIR, interleaved views in, as released.

    Source: AIR. All similarities of the batch are computed, and those of a view with its own image kept; the first
    argument of the divergence is a probability where a logarithm belongs.
    """
    first, second = (list(range(start, len(z), 2)) for start in (0, 1))
    z, z_adv, z_original = (F.normalize(part, dim=1) for part in (z, z_adv, z_original))
    diagonal = torch.eye(len(z_original), dtype=torch.bool)

    def profile(u: Tensor, v: Tensor) -> Tensor:
        return F.softmax((u @ v.t() / temperature)[diagonal.to(u.device)], dim=0)

    a, b = profile(z[first], z_original), profile(z[second], z_original)
    a_adv = profile(z_adv[first], z_original) * profile(z_adv[first], z[first])
    b_adv = profile(z_adv[second], z_original) * profile(z_adv[second], z[second])
    standard = F.kl_div(a, b.log(), log_target=True, reduction="sum")
    robust = F.kl_div(a_adv, b_adv.log(), log_target=True, reduction="sum")
    return standard, robust


def pgd(
    model: Any,
    x: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    noise: Tensor,
    *,
    eps: float = EPS,
    step_size: float = STEP_SIZE,
    steps: int = STEPS,
    by_backward: bool = True,
) -> Tensor:
    """Adversarial images `(N, 3, H, W)`, the last iterate.

    Args:
        model (`Any`): set to evaluation mode, and left in it.
        x (`torch.Tensor`): images in [0, 1].
        loss_of (`Callable[[Tensor], Tensor]`): images in, the scalar that is raised out.
        noise (`torch.Tensor` of the shape of `x`): the start, not clipped to the range of images.
        eps, step_size, steps: of the attack.
        by_backward (`bool`, defaults to `True`): `loss.backward()`, which also computes the gradient of every
            parameter that wants one (pre-training), or the gradient of the images alone (fine-tuning).
    """
    delta = noise.clone()
    for _ in range(steps):
        model.eval()
        delta = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = loss_of(x + delta)
        if by_backward:
            loss.backward()
            gradient = delta.grad
        else:
            (gradient,) = torch.autograd.grad(loss, delta)
        assert gradient is not None
        delta = delta.detach() + step_size * gradient.sign()
        delta = torch.clamp(delta, -eps, eps)
        delta = torch.clamp(x + delta, 0, 1) - x
    return (x + delta).detach()


def uniform_noise(x: Tensor, eps: float = EPS) -> Tensor:
    """A start anywhere in the ball."""
    return torch.empty_like(x).uniform_(-eps, eps)


class PerTensorLARS(torch.optim.Optimizer):
    """LARS, one tensor after the other; two norms of each come to the host.

    Source: the optimiser file shared by the released ACL, AIR, RCS and DynACL code, as specified.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        eta: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                weight_norm, grad_norm = p.norm(), p.grad.norm()
                rate: Tensor | float = 1.0
                if float(weight_norm) >= 1e-15 and float(grad_norm) >= 1e-15:
                    rate = group["eta"] * weight_norm / (grad_norm + group["weight_decay"] * weight_norm)
                decayed = p.grad + group["weight_decay"] * p
                buffer = self.state[p]["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(decayed * rate * group["lr"])
                p.sub_(buffer)


class ContrastiveStep:
    """One training step of ACL (dual stream), or of ACL-AIR when un-augmented images are given.

    Attack through the adversarial branch in evaluation mode; then, in train mode, a pass of its own for the
    adversarial images, the clean ones and, with AIR, the un-augmented ones; LARS. 21 forward passes' worth of
    arithmetic per view (ACL), 22.5 (AIR).

    Args:
        model ([`RobustModelForPreTraining`]): with the branches `clean` and `adv`.
        lr (`float`): learning rate.
        lambda1, lambda2 (`float`): weights of the invariance terms.

    Source: ACL (Jiang et al. 2020), AIR (Xu et al. 2023), released versions.
    """

    def __init__(self, model: Any, lr: float, lambda1: float = 0.5, lambda2: float = 0.5) -> None:
        self.model, self.lambda1, self.lambda2 = model, lambda1, lambda2
        self.optimizer = PerTensorLARS(model.parameters(), lr)

    def __call__(self, views: Tensor, originals: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Train one step.

        Args:
            views (`torch.Tensor` of shape `(2N, 3, H, W)`): interleaved, in [0, 1].
            originals (`torch.Tensor` of shape `(N, 3, H, W)`, *optional*): un-augmented images; AIR.
            noise (`torch.Tensor`, *optional*): start of the attack; default: uniform.

        Returns:
            `torch.Tensor`: the loss before the step.
        """
        model = self.model
        contrast = nt_xent if originals is None else nt_xent_by_classes
        noise = uniform_noise(views) if noise is None else noise
        adversarial = pgd(model, views, lambda x: contrast(model.embed(x, "adv")), noise)
        model.train()
        self.optimizer.zero_grad()
        z_adv = model.embed(adversarial, "adv")
        z = model.embed(views, "clean")
        if originals is None:
            loss = (contrast(z) + contrast(z_adv)) / 2
        else:
            standard, robust = invariance(z, z_adv, model.embed(originals, "clean"))
            loss = contrast(z) + contrast(z_adv) + self.lambda1 * standard + self.lambda2 * robust
        loss.backward()
        self.optimizer.step()
        return loss.detach()
