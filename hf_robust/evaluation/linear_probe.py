"""Softmax regression on frozen features: convex, solved to the end, without a random part."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["WEIGHT_DECAY", "check_features", "fit_linear_probe"]

WEIGHT_DECAY = 1e-3


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, *, weight_decay: float = WEIGHT_DECAY, max_iter: int = 300
) -> nn.Linear:
    """Fit a softmax regression on frozen features, the same one every time.

    The features are standardised, the convex problem is solved by L-BFGS in float64 from zero, and the
    standardisation is folded back into the layer, which therefore takes raw features. A direction with (almost) no
    spread is not blown up: no standard deviation counts as less than a thousandth of their root mean square.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): frozen features, any float type.
        labels (`torch.Tensor` of shape `(N,)`): classes in [0, `num_classes`).
        num_classes (`int`): number of logits C.
        weight_decay (`float`, defaults to 1e-3, ours): factor of half the squared norm of the weights on
            standardised features, beside the mean cross-entropy; the bias is free.
        max_iter (`int`, defaults to 300, ours): most L-BFGS iterations.

    Returns:
        `nn.Linear` from D to C: float32, on the device of `features`, without gradients.

    Raises:
        ValueError: if the features are not 2-d or not finite, or the labels do not fit or name one class only.
    """
    check_features(features)
    _check_labels(labels, len(features), num_classes)
    # Apple's backend has no float64; the problem is small.
    solver = torch.device("cpu") if features.device.type == "mps" else features.device
    x, y = features.detach().to(solver, torch.float64), labels.detach().to(solver)
    mean, scale = _standardisation(x)
    weight, bias = _softmax_regression((x - mean) / scale, y, num_classes, weight_decay, max_iter)
    weight = weight / scale
    # Made on "meta" so that the default initialisation draws nothing from the global random state.
    head = nn.Linear(x.shape[1], num_classes, device="meta").to_empty(device=features.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias - weight @ mean)
    return head.requires_grad_(False).eval()


def check_features(features: Tensor) -> Tensor:
    """Let features through if a probe can use them.

    Args:
        features (`torch.Tensor`): what the encoder gave.

    Returns:
        `torch.Tensor` of shape `(N, D)`: the same tensor.

    Raises:
        ValueError: if it is not 2-d, or holds NaN or infinite values.
    """
    if features.dim() != 2:
        raise ValueError(
            f"features must be 2-d (N, D), got shape {tuple(features.shape)}: pool the feature map, e.g. .mean((2, 3))"
        )
    if not bool(torch.isfinite(features).all()):
        bad = int((~torch.isfinite(features)).sum())
        raise ValueError(
            f"{bad} of {features.numel()} feature values are NaN or infinite, a probe needs finite ones: the encoder "
            "has diverged (lower its learning rate) or its images are not in [0, 1]"
        )
    return features


def _standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = x.mean(0), x.std(0, correction=0)
    floor = 1e-3 * std.square().mean().sqrt()
    # All features constant: nothing to learn from, but nothing to divide by zero either.
    return mean, std.clamp_min(float(floor)) if floor > 0 else torch.ones_like(std)


@torch.enable_grad()
def _softmax_regression(
    x: Tensor, y: Tensor, num_classes: int, weight_decay: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss = cross_entropy(x @ weight.T + bias, y) + 0.5 * weight_decay * weight.square().sum()
        weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _check_labels(labels: Tensor, n: int, num_classes: int) -> None:
    if labels.shape != (n,):
        raise ValueError(
            f"labels must have shape ({n},), one per feature row, got {tuple(labels.shape)}: flatten them"
        )
    if labels.is_floating_point() or n == 0 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        values = f"{labels.dtype} from {labels.min()} to {labels.max()}" if n else "no labels"
        raise ValueError(
            f"labels must be whole numbers in [0, {num_classes}), got {values}: number the classes from 0, or raise "
            "num_classes"
        )
    if len(labels.unique()) < 2:
        raise ValueError(f"got one class ({int(labels[0])}), a probe tells at least 2 apart: take other images")
