"""Equations between a student's features and those of a frozen teacher; pure functions, float32 inside.

Every value is a mean over the images of this process, and no image's value depends on another's: nothing is gathered,
the average that distributed training takes of the gradients is the gradient of the global mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["deacl_terms", "mean_cosine", "mean_squared_distance"]


def mean_cosine(z: Tensor, z_other: Tensor) -> Tensor:
    """Mean over the images of the cosine between two features of the same image.

    Args:
        z (`torch.Tensor` of shape `(N, D)`): features, not normalised.
        z_other (`torch.Tensor` of shape `(N, D)`): row k belongs to the image of `z[k]`.

    Returns:
        `torch.Tensor` of shape `()`, in [-1, 1]; differentiable in both arguments.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_pair(z, z_other)
    with torch.autocast(z.device.type, enabled=False):  # a cosine near 1 has no digits left in bf16
        return F.cosine_similarity(_wide(z), _wide(z_other), dim=1).mean()


def deacl_terms(z: Tensor, z_adv: Tensor, z_teacher: Tensor, adversarial_weight: float = 2.0) -> tuple[Tensor, Tensor]:
    """The two terms of DeACL: stay at the teacher on clean images, and near oneself on adversarial ones.

    -mean cos(z, z_teacher) and -`adversarial_weight` mean cos(z_adv, z). No gradient is stopped: the second term moves
    the clean features, too.

    Args:
        z (`torch.Tensor` of shape `(N, D)`): features of clean images.
        z_adv (`torch.Tensor` of shape `(N, D)`): features of the same images, attacked.
        z_teacher (`torch.Tensor` of shape `(N, D)`): the teacher's features of the clean images, a constant.
        adversarial_weight (`float`, defaults to 2, as released): 0 or more.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: clean and adversarial term, each `()`; at best -1 and -`weight`.

    Raises:
        ValueError: if shapes differ.

    Source: Zhang et al. 2022; released `solo/methods/mocov2_distillation_AT.py` (`training_step`, `trades_k`).
    """
    return -mean_cosine(z, z_teacher), -adversarial_weight * mean_cosine(z_adv, z)


def mean_squared_distance(z: Tensor, z_other: Tensor) -> Tensor:
    """Mean over the images of the squared Euclidean distance between two features of the same image.

    Args:
        z (`torch.Tensor` of shape `(N, D)`): features.
        z_other (`torch.Tensor` of shape `(N, D)`): row k belongs to the image of `z[k]`.

    Returns:
        `torch.Tensor` of shape `()`: summed over the D dimensions, averaged over the N images.

    Raises:
        ValueError: if the shapes differ.

    Source: Schlarmann et al. 2024, the loss of FARE; released `train/adversarial_training_clip.py` (`--loss l2`).
    """
    _check_pair(z, z_other)
    with torch.autocast(z.device.type, enabled=False):
        return (_wide(z) - _wide(z_other)).square().sum(1).mean()


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _check_pair(z: Tensor, z_other: Tensor) -> None:
    if z.ndim != 2 or z.shape != z_other.shape:
        raise ValueError(
            f"features must be two (N, D) tensors of one shape, got {tuple(z.shape)} and {tuple(z_other.shape)}: take "
            "a student as wide as its teacher, and the same images for both"
        )
